from contextlib import nullcontext
from pathlib import Path

import pytest

from heterorl.v1 import control_pb2, monitor_pb2, types_pb2
from services.learner.config import LearnerConfig
from services.learner.preflight import _check_writable, _warn_of_long_groups, _warn_of_overlap
from services.runtime.config import load
from services.runtime.errors import ConfigError, StorageError
from services.wire.types import Prompt


@pytest.mark.parametrize(("group_size", "longest", "warns"), [(16, 32768, False), (64, 16384, True), (8, 80_000, True)])
def test_groups_too_long_for_a_message_are_announced_at_the_start(
    caplog: pytest.LogCaptureFixture, group_size: int, longest: int, warns: bool
) -> None:
    config = LearnerConfig.model_validate(
        {"listen": {"insecure": True}, "sampling": {"group_size": group_size, "max_completion_tokens": longest}}
    )
    _warn_of_long_groups(config)
    assert ("samplers give up longer groups" in caplog.text) is warns


def test_held_out_prompts_that_are_trained_on_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["1+1?", "1+2?", "2+2?"]
    prompts = [Prompt(prompt_id=text, text=text, answer="x", metadata_json="") for text in texts]
    again = Prompt(prompt_id="0", text="1+1? ", answer="2", metadata_json="")
    _warn_of_overlap(prompts[:2], prompts[2:])
    assert not caplog.records
    _warn_of_overlap(prompts[:2], [again, *prompts[1:]])
    assert "2 of the 3 prompts of data.eval are in data.train too" in caplog.text


@pytest.mark.parametrize(
    ("loss", "weights", "fits"),
    [
        ({"name": "bnpo"}, (1.0,), True),
        ({"name": "bnpo"}, (0.1, 0.2, 0.7), True),
        ({"name": "bnpo"}, (1.0, 0.1), False),
        ({"name": "grpo", "advantage": "bnpo"}, (1.0, -0.1), False),
        ({"name": "bnpo", "advantage": "mean"}, (1.0, 0.1), True),
    ],
)
def test_bnpo_is_refused_where_rewards_could_leave_zero_to_one(
    loss: dict[str, str], weights: tuple[float, ...], fits: bool
) -> None:
    tree = {"loss": loss, "reward": [{"weight": weight} for weight in weights]}
    with nullcontext() if fits else pytest.raises(ValueError, match="between 0 and 1"):
        LearnerConfig.model_validate(tree)


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 20}])
def test_log_probs_of_a_truncated_distribution_cannot_be_recomputed(sampling: dict[str, float]) -> None:
    """The weights of what was drawn would be those of draws from the whole distribution: biased, and nothing to see."""
    LearnerConfig.model_validate({"sampling": sampling})
    LearnerConfig.model_validate({"batch": {"recompute_logprobs": True}})
    with pytest.raises(ValueError, match="set top_p to 1 and top_k to 0"):
        LearnerConfig.model_validate({"sampling": sampling, "batch": {"recompute_logprobs": True}})


@pytest.mark.parametrize(
    ("bounds", "fits"),
    [({}, True), ({"weight_cap": 0.3}, False), ({"weight_floor": 5.0}, False), ({"weight_floor": 0.0}, True)],
)
def test_bounds_of_weights_that_leave_no_token_are_refused(bounds: dict[str, float], fits: bool) -> None:
    with nullcontext() if fits else pytest.raises(ValueError, match="icepop would use no token"):
        LearnerConfig.model_validate({"loss": {"name": "icepop", **bounds}})
    LearnerConfig.model_validate({"loss": {"name": "tis", **bounds}})


def test_folders_that_cannot_be_written_are_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of weeks is not to learn at its end that its policy can be put nowhere."""
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for fits in (tmp_path, tmp_path / "new" / "newer"):
        _check_writable("run.state_dir", fits)
    for folder in ("file", "file/below", "nowhere", "nowhere/below"):
        with pytest.raises(StorageError, match=r"run\.export_dir cannot be used: .*/(file|nowhere) is not a folder"):
            _check_writable("run.export_dir", tmp_path / folder)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(StorageError, match=f"this user may not write to {tmp_path}$"):
        _check_writable("run.state_dir", tmp_path / "new")


COUNTED_IN_MESSAGES = [
    "data.max_prompt_tokens",
    "sampling.group_size",
    "sampling.max_completion_tokens",
    "sampling.top_k",
    "eval.samples",
    "batch.groups_per_step",
    "lease.ttl_s",
    "lease.session_ttl_s",
    "lease.heartbeat_s",
]


@pytest.mark.parametrize("key", COUNTED_IN_MESSAGES)
def test_what_no_message_can_carry_is_refused_at_the_start(key: str) -> None:
    """Else each registration is a fault of the learner, and samplers try again for ever."""
    with pytest.raises(ConfigError, match=rf"{key} is .* less than or equal to 10+"):
        load(LearnerConfig, None, [f"--{key}={1 << 62}"], {})


def test_the_largest_settings_fit_a_message() -> None:
    words = ["--lease.ttl_s=1e6", "--lease.session_ttl_s=1e6", "--lease.heartbeat_s=8e5"]
    most = load(LearnerConfig, None, [f"--{key}={10**9}" for key in COUNTED_IN_MESSAGES[:6]] + words, {}).value
    control_pb2.RunSettings(
        group_size=most.sampling.group_size,
        max_staleness=most.staleness.max_staleness,
        max_prompt_tokens=most.data.max_prompt_tokens,
        sampling=types_pb2.SamplingSettings(
            max_completion_tokens=most.sampling.max_completion_tokens, top_k=most.sampling.top_k
        ),
    )
    control_pb2.Lease(group_size=most.eval.samples, ttl_ms=int(most.lease.ttl_s * 1000))
    control_pb2.RegisterResponse(
        heartbeat_interval_ms=int(most.lease.heartbeat_s * 1000), session_ttl_ms=int(most.lease.session_ttl_s * 1000)
    )
    monitor_pb2.RunStatus(groups_per_step=most.batch.groups_per_step)

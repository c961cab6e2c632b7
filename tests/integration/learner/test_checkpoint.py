"""A checkpoint holds everything: the steps after it are the same as without an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from safetensors import SafetensorError

from services.lab.tiny_policy import character_tokenizer, save_policy, tiny_model
from services.learner import tensor_file
from services.learner.checkpoint import Checkpoints, Position
from services.learner.config import OptimizerSection, PolicySection
from services.learner.losses.settings import LossSettings
from services.learner.policy import Policy, load_policy
from services.learner.trainer import Trainer, TrainerSettings
from services.runtime import failpoints
from services.runtime.errors import ConfigError, CorruptObjectError, DiskFullError, StorageError
from services.wire.delta import root_of
from tests.integration.learner.conftest import SMALL
from tests.support.tiny_families import save_family
from tests.support.train_groups import train_group


def fresh(policy_dir: Path) -> tuple[Policy, Trainer]:
    policy = load_policy(PolicySection(path=policy_dir, device="cpu"))
    settings = TrainerSettings(
        optimizer=OptimizerSection(lr=1e-3),
        loss=LossSettings(),
        temperature=1.0,
        micro_batch_tokens=1000,
        autocast=False,
    )
    return policy, Trainer(policy, settings)


def at(step: int, policy: Policy, trainer: Trainer) -> Position:
    return Position(
        step=step,
        version=step,
        root=root_of(policy.wire_weights()),
        trainer_steps=trainer.steps_taken,
        data={"step": step},
        counters={"evals": [0.5]},
    )


def test_training_goes_on_bit_for_bit_after_a_restore(tmp_path: Path, policy_dir: Path) -> None:
    policy, trainer = fresh(policy_dir)
    checkpoints = Checkpoints(tmp_path, keep=2)
    trainer.step([train_group(1), train_group(2)])
    checkpoints.write(at(1, policy, trainer), policy, trainer)
    trainer.step([train_group(3), train_group(4)])
    again, trainer_again = fresh(policy_dir)
    position = Checkpoints(tmp_path, keep=2).restore(again, trainer_again)
    assert position is not None
    assert (position.step, position.data, position.counters) == (1, {"step": 1}, {"evals": [0.5]})
    assert root_of(again.wire_weights()) == position.root
    trainer_again.step([train_group(3), train_group(4)])
    assert root_of(again.wire_weights()) == root_of(policy.wire_weights())


def test_a_routers_buffers_are_those_that_travel_after_a_restore_too(tmp_path: Path) -> None:
    """A release before wrote them unrounded, and samplers draw with the rounded ones."""
    save_family(tmp_path / "model", "deepseek_v3", character_tokenizer())
    policy, trainer = fresh(tmp_path / "model")
    (name,) = [name for name in policy.parameters() if name.endswith("e_score_correction_bias")]
    policy.parameters()[name].fill_(100.3)
    Checkpoints(tmp_path / "checkpoints", keep=1).write(at(1, policy, trainer), policy, trainer)
    again, trainer_again = fresh(tmp_path / "model")
    assert Checkpoints(tmp_path / "checkpoints", keep=1).restore(again, trainer_again) is not None
    assert set(again.parameters()[name].tolist()) == {100.5}
    assert root_of(again.wire_weights()) == root_of(policy.wire_weights())


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, policy_dir: Path) -> None:
    policy, trainer = fresh(policy_dir)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.write(at(step, policy, trainer), policy, trainer)
    assert checkpoints.steps() == [3, 2]
    masters = tmp_path / "step-00000003" / "masters.safetensors"
    data = bytearray(masters.read_bytes())
    data[-1] ^= 1
    masters.write_bytes(bytes(data))
    position = checkpoints.restore(policy, trainer)
    assert position is not None
    assert position.step == 2
    (tmp_path / "step-00000002" / "state.json").write_text("{")
    with pytest.raises(CorruptObjectError, match="no checkpoint"):
        checkpoints.restore(policy, trainer)


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path: Path, policy_dir: Path) -> None:
    policy, trainer = fresh(policy_dir)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.write(at(step, policy, trainer), policy, trainer)
    masters = tmp_path / "step-00000002" / "masters.safetensors"
    kept = masters.rename(tmp_path / "elsewhere")
    masters.symlink_to(masters.name)  # cannot be read by root either
    with pytest.raises(StorageError, match=r"step-00000002 cannot be read .*: mend that, or move it away"):
        checkpoints.restore(policy, trainer)
    kept.replace(masters)
    assert (position := checkpoints.restore(policy, trainer)) is not None
    assert position.step == 2


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(StorageError, match="cannot read"):
        checkpoints.steps()


def test_a_new_checkpoint_outlives_the_damaged_ones_of_later_steps(tmp_path: Path, policy_dir: Path) -> None:
    policy, trainer = fresh(policy_dir)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 8, 9):
        Checkpoints(tmp_path, keep=3).write(at(step, policy, trainer), policy, trainer)
    for step in (8, 9):
        (tmp_path / f"step-{step:08d}" / "masters.safetensors").write_bytes(b"x")
    assert (position := checkpoints.restore(policy, trainer)) is not None
    assert position.step == 1
    checkpoints.write(at(2, policy, trainer), policy, trainer)
    assert checkpoints.steps() == [2, 1]


@pytest.mark.parametrize(("old", "new"), [('"trainer_steps": 0', '"trainer_steps": 8'), ('"step": 3', '"step": 7')])
def test_a_flipped_number_in_its_state_is_found(tmp_path: Path, policy_dir: Path, old: str, new: str) -> None:
    policy, trainer = fresh(policy_dir)
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = checkpoints.write(at(3, policy, trainer), policy, trainer) / "state.json"
    text = state.read_text()
    assert old in text
    state.write_text(text.replace(old, new))
    with pytest.raises(CorruptObjectError, match="does not have its digest"):
        checkpoints.restore(policy, trainer)


@pytest.mark.parametrize("change", [{"layers": 3}, {"hidden_size": 48}])
def test_a_checkpoint_of_another_model_is_told_apart_from_a_damaged_one(
    tmp_path: Path, policy_dir: Path, change: dict[str, int]
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    policy, trainer = fresh(policy_dir)
    checkpoints.write(at(1, policy, trainer), policy, trainer)
    tokenizer = character_tokenizer()
    save_policy(tmp_path / "other", tiny_model(tokenizer, replace(SMALL, **change), seed=1), tokenizer)
    with pytest.raises(ConfigError, match=r"another model than policy\.path"):
        checkpoints.restore(*fresh(tmp_path / "other"))


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"format": 2, "optimizer": "other"}, {"kept_for": "a later release"}]
)
def test_a_checkpoint_of_another_release_is_refused_and_not_taken_for_a_damaged_one(
    tmp_path: Path, policy_dir: Path, change: dict[str, object]
) -> None:
    """Else the run would go on from the one before, and remove it."""
    policy, trainer = fresh(policy_dir)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.write(at(step, policy, trainer), policy, trainer)
    path = tmp_path / "step-00000002" / "state.json"
    state = {**json.loads(path.read_bytes()), **change}
    del state["digest"]
    digest = blake3(json.dumps(state, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**state, "digest": digest}))
    with pytest.raises(ConfigError, match=r"step-00000002 is of another release, .*: start that release"):
        checkpoints.restore(policy, trainer)
    assert checkpoints.steps() == [2, 1]


def test_a_copy_beside_a_checkpoint_is_left_alone(tmp_path: Path, policy_dir: Path) -> None:
    policy, trainer = fresh(policy_dir)
    checkpoints = Checkpoints(tmp_path, keep=1)
    (tmp_path / "step-00000001.bak").mkdir()
    for step in (1, 2):
        checkpoints.write(at(step, policy, trainer), policy, trainer)
    assert checkpoints.steps() == [2]
    assert (tmp_path / "step-00000001.bak").is_dir()


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, trainer = fresh(policy_dir)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(DiskFullError, match="No space left on device: free disk space"):
        Checkpoints(tmp_path, keep=2).write(at(1, policy, trainer), policy, trainer)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_was_cut_short_does_not_exist(tmp_path: Path, policy_dir: Path) -> None:
    policy, trainer = fresh(policy_dir)
    failpoints.arm("checkpoint.before_rename=error")
    try:
        with pytest.raises(StorageError):
            Checkpoints(tmp_path, keep=2).write(at(1, policy, trainer), policy, trainer)
    finally:
        failpoints.arm("")
    assert Checkpoints(tmp_path, keep=2).restore(policy, trainer) is None
    assert list(tmp_path.iterdir()) == []

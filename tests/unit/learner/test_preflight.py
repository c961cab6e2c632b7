from contextlib import nullcontext

import pytest

from services.learner.config import LearnerConfig
from services.learner.preflight import _warn_of_long_groups


@pytest.mark.parametrize(("group_size", "longest", "warns"), [(16, 32768, False), (64, 16384, True), (8, 80_000, True)])
def test_groups_too_long_for_a_message_are_announced_at_the_start(
    caplog: pytest.LogCaptureFixture, group_size: int, longest: int, warns: bool
) -> None:
    config = LearnerConfig.model_validate(
        {"listen": {"insecure": True}, "sampling": {"group_size": group_size, "max_completion_tokens": longest}}
    )
    _warn_of_long_groups(config)
    assert ("samplers give up longer groups" in caplog.text) is warns


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

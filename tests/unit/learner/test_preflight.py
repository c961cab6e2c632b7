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

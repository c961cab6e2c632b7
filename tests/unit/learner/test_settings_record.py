from pathlib import Path

import pytest

from services.learner.config import LearnerConfig
from services.learner.run_state import RunState
from services.learner.settings_record import settings_of, tell_of_changes


def test_a_run_that_goes_on_with_other_settings_is_told_which(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    before = LearnerConfig.model_validate({"listen": {"address": "127.0.0.1:7443"}, "sampling": {"group_size": 4}})
    saved = RunState(settings=settings_of(before)).to_json()["settings"]
    assert isinstance(saved, dict)
    elsewhere = before.model_copy(update={"run": before.run.model_copy(update={"state_dir": tmp_path, "steps": 9})})
    tell_of_changes(saved, settings_of(elsewhere))
    tell_of_changes({}, settings_of(before))  # of a release that kept none
    assert not caplog.records
    now = LearnerConfig.model_validate({"optimizer": {"lr": 0.5}, "reward": [{"name": "text"}]})
    tell_of_changes(saved, settings_of(now))
    (record,) = caplog.records
    assert "settings_changed" in record.getMessage()
    changes = [change.partition(":")[0] for change in vars(record)["heterorl_facts"]["changes"]]
    assert sorted(changes) == ["optimizer.lr", "reward", "sampling.group_size"]

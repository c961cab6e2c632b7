from pathlib import Path

import pytest

from services.cli import main


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_a_demo_without_steps_is_refused_before_it_touches_a_folder(
    steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", "--steps", steps, "--out", str(tmp_path / "out")]) == 2
    assert "1 optimizer step or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

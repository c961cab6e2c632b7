from pathlib import Path

import pytest

from services.cli import main
from services.commands.demo import fresh_folder
from services.runtime.errors import UsageError


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_a_demo_without_steps_is_refused_before_it_touches_a_folder(
    steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", "--steps", steps, "--out", str(tmp_path / "out")]) == 2
    assert "1 optimizer step or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_anything_but_a_demo_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds other things"):
        fresh_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


def test_an_earlier_demo_is_kept_beside_the_new_one(tmp_path: Path):
    (tmp_path / "demo" / "work" / "pki").mkdir(parents=True)
    assert fresh_folder(tmp_path / "demo") == tmp_path / "demo"
    new, kept = sorted(tmp_path.iterdir())
    assert (list(new.iterdir()), list(kept.iterdir())) == ([], [kept / "work"])

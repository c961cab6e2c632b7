"""Where a policy may be exported to: nothing of anybody else's is ever removed."""

from pathlib import Path

import pytest

from services.learner.export_folder import CARD_NAME, MARK, check_export_folder, holds_export, replace_export
from services.runtime.errors import ConfigError


def export(directory: Path, root: str) -> Path:
    directory.mkdir()
    (directory / CARD_NAME).write_text(f"{MARK} `{root}`")
    (directory / "model.safetensors").touch()
    return directory


@pytest.mark.parametrize("name", ["model", "train.jsonl", "gone"])
def test_what_is_no_export_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="no earlier export"):
        check_export_folder(tmp_path / name)
    new = export(tmp_path / ".new", "a")
    with pytest.raises(ConfigError, match="no earlier export"):
        replace_export(tmp_path / name, new)
    assert sorted(path for path in tmp_path.rglob("*") if new not in (path, path.parent)) == before


@pytest.mark.parametrize("name", ["absent", "empty", "earlier"])
def test_nothing_an_empty_folder_and_an_earlier_export_give_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    export(tmp_path / "earlier", "a")
    check_export_folder(tmp_path / name)
    replace_export(tmp_path / name, export(tmp_path / ".new", "b"))
    assert holds_export(tmp_path / name, "b")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_export_without_its_weights_is_none(tmp_path: Path) -> None:
    assert not holds_export(tmp_path / "absent", "a")
    folder = export(tmp_path / "policy", "a")
    assert holds_export(folder, "a")
    assert not holds_export(folder, "b")
    (folder / "model.safetensors").unlink()
    assert not holds_export(folder, "a")

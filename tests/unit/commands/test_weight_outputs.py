"""`heterorl weights` replaces nothing that it reads, removes nothing but its own, and leaves nothing half done."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.cli import main
from services.commands import weight_outputs
from services.wire.delta import BitTensor, decode, layout, read_weights, write_weights
from tests.unit.wire.delta.samples import model, nudged, same, tensor

Policy = dict[str, BitTensor]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Policy, Policy]:
    """base.safetensors and new.safetensors in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = model(rng)
    new = nudged(rng, base, 0.02)
    write_weights(base, "base.safetensors")
    write_weights(new, "new.safetensors")
    return base, new


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout, "PART_BYTES", 4096)


def weights(*words: object) -> int:
    return main(["weights", *map(str, words)])


def checkpoint(folder: Path, policy: Policy, files: int = 2) -> Path:
    """A folder of several files and their index."""
    folder.mkdir()
    names = sorted(policy)
    mapping: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: policy[name] for name in names[number::files]}
        write_weights(part, folder / file)
        mapping |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words",
    [
        ["diff", "hf0", "hf1", "-o", "hf0/model-00001-of-00002.safetensors"],
        ["diff", "hf0", "hf1", "-o", "hf1/model-00002-of-00002.safetensors"],
        ["diff", "base.safetensors", "new.safetensors", "-o", "new.safetensors"],
        ["diff", "base.safetensors", "link.safetensors", "-o", "new.safetensors"],
        ["apply", "base.safetensors", "delta.safetensors", "-o", "delta.safetensors"],
        ["apply", "base.safetensors", "folder", "-o", "folder"],
        ["apply", "hf0", "delta.safetensors", "-o", "hf0/model-00001-of-00002.safetensors"],
    ],
)
def test_what_is_read_is_never_replaced(
    pair: tuple[Policy, Policy], tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "hf0", pair[0])
    checkpoint(tmp_path / "hf1", pair[1])
    Path("link.safetensors").symlink_to("new.safetensors")
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "delta.safetensors") == 0
    Path("folder").mkdir()
    Path("folder/model.safetensors").write_bytes(Path("delta.safetensors").read_bytes())
    before = contents(tmp_path)
    assert weights(*words) == 2
    assert "write somewhere else" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_parts_of_a_delta_do_not_replace_the_files_of_a_checkpoint(
    pair: tuple[Policy, Policy], tmp_path: Path, many_parts: None
) -> None:
    hf0, hf1 = checkpoint(tmp_path / "hf0", pair[0]), checkpoint(tmp_path / "hf1", pair[1])
    before = contents(tmp_path)
    assert weights("diff", hf0, hf1, "-o", hf0 / "model.safetensors") == 65, "they would be read as parts of it"
    assert contents(tmp_path) == before


def test_a_checkpoint_may_be_brought_forward_in_its_own_folder(pair: tuple[Policy, Policy], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hf", pair[0])
    write_weights({"extra": tensor("U8", [1])}, folder / "model-00001-of-00009.safetensors")
    assert weights("diff", folder, "new.safetensors", "-o", "delta.safetensors") == 0
    assert weights("apply", folder, "delta.safetensors", "-o", folder) == 0
    assert same(read_weights(folder), pair[1])
    assert sorted(contents(folder)) == ["config.json", "model-00001-of-00009.safetensors", "model.safetensors"]


def test_apply_removes_nothing_in_a_folder_that_is_not_the_base(
    pair: tuple[Policy, Policy], tmp_path: Path, many_parts: None
) -> None:
    Path("out").mkdir()
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "out/model-x.safetensors") == 0
    parts = contents(Path("out"))
    assert len(parts) > 3
    assert weights("apply", "base.safetensors", "out/model-x.safetensors", "-o", "out") == 0
    assert parts.items() < contents(Path("out")).items()
    other = checkpoint(tmp_path / "other", pair[0])
    before = contents(other)
    assert weights("apply", "base.safetensors", "out/model-x.safetensors", "-o", other) == 2
    assert contents(other) == before


def test_deltas_whose_names_begin_alike_leave_each_other_alone(pair: tuple[Policy, Policy], many_parts: None) -> None:
    for name in ("step-1", "step", "step-1-00001-of-00002", "g[1]", "a**b", "**"):
        assert weights("diff", "base.safetensors", "new.safetensors", "-o", f"{name}.safetensors") == 0
    for name in ("step-1", "step", "step-1-00001-of-00002", "g[1]", "a**b", "**"):
        assert weights("verify", f"{name}.safetensors", "--base", "base.safetensors") == 0


def test_an_earlier_delta_of_the_name_goes_with_all_its_parts(
    pair: tuple[Policy, Policy], monkeypatch: pytest.MonkeyPatch, many_parts: None
) -> None:
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "d.safetensors") == 0
    monkeypatch.setattr(layout, "PART_BYTES", 64 << 20)
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "d.safetensors") == 0
    assert [path.name for path in Path().glob("d*")] == ["d.safetensors"]


@pytest.mark.parametrize("left_over", [b"abc", None])
def test_a_file_that_would_be_taken_for_a_part_is_named(
    pair: tuple[Policy, Policy], left_over: bytes | None, many_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("d-00001-of-00900.safetensors").write_bytes(left_over or Path("base.safetensors").read_bytes())
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "d.safetensors") == 65
    assert "d-00001-of-00900.safetensors is no weight update" in capsys.readouterr().err
    assert len(list(Path().glob("d-*"))) == 1


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full after three parts."""
    write = weight_outputs.atomic_write
    left = [3]

    def limited(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(weight_outputs, "atomic_write", limited)


@pytest.mark.parametrize("out", ["d.safetensors", "d"])
def test_a_diff_that_fails_leaves_the_delta_that_was_there(
    pair: tuple[Policy, Policy], tmp_path: Path, out: str, many_parts: None, request: pytest.FixtureRequest
) -> None:
    assert weights("diff", "base.safetensors", "base.safetensors", "-o", out) == 0
    before = contents(tmp_path)
    request.getfixturevalue("full_disk")
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", out) == 74
    assert contents(tmp_path) == before


def test_a_diff_that_fails_leaves_no_folder(pair: tuple[Policy, Policy], many_parts: None, full_disk: None) -> None:
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "made") == 74
    assert not Path("made").exists()


def test_an_apply_that_fails_leaves_no_folder(
    pair: tuple[Policy, Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(tmp_path / "hf", pair[0])
    assert weights("diff", base, "new.safetensors", "-o", "d.safetensors") == 0

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = sorted(contents(tmp_path))
    assert weights("apply", base, "d.safetensors", "-o", "out") == 74
    assert weights("apply", base, "d.safetensors", "-o", "out.safetensors") == 74
    assert sorted(contents(tmp_path)) == before


def test_an_apply_makes_the_weights_in_their_file(pair: tuple[Policy, Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the whole of a large model need not be there."""
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "d.safetensors") == 0

    def allocate(forms: object) -> Policy:
        raise MemoryError(forms)

    monkeypatch.setattr(decode, "allocate", allocate)
    assert weights("verify", "d.safetensors", "--base", "base.safetensors") == 75
    assert weights("apply", "base.safetensors", "d.safetensors", "-o", "out.safetensors") == 0
    assert Path("out.safetensors").read_bytes() == Path("new.safetensors").read_bytes()


def test_the_wrong_base_leaves_nothing_and_the_old_result(pair: tuple[Policy, Policy], tmp_path: Path) -> None:
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "d.safetensors") == 0
    assert weights("apply", "base.safetensors", "d.safetensors", "-o", "out.safetensors") == 0
    before = contents(tmp_path)
    assert weights("apply", "new.safetensors", "d.safetensors", "-o", "out.safetensors") == 65
    assert weights("apply", "new.safetensors", "d.safetensors", "-o", "folder") == 65
    assert contents(tmp_path) == before


def test_only_what_is_not_weights_goes_with_a_checkpoint(pair: tuple[Policy, Policy], tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "hf", pair[0])
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.json"):
        (base / name).write_text("{}")
    Path("out").mkdir()
    Path("out/config.json").symlink_to(base / "config.json")
    assert weights("diff", base, "new.safetensors", "-o", "d.safetensors") == 0
    assert weights("apply", base, "d.safetensors", "-o", "out") == 0
    assert sorted(contents(Path("out"))) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_delta_is_not_called_a_checkpoint(pair: tuple[Policy, Policy], capsys: pytest.CaptureFixture[str]) -> None:
    Path("hf").mkdir()
    assert weights("diff", "base.safetensors", "base.safetensors", "-o", "hf/model.safetensors") == 0
    assert weights("verify", "hf") == 0
    assert "sound delta" in capsys.readouterr().out
    assert weights("diff", "hf", "new.safetensors", "-o", "d.safetensors") == 65
    assert "is a weight update, not weights" in capsys.readouterr().err


def test_a_base_for_weights_is_a_mistake(pair: tuple[Policy, Policy], capsys: pytest.CaptureFixture[str]) -> None:
    assert weights("verify", "base.safetensors", "--base", "nowhere") == 2
    assert "--base is for deltas" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--target-version", "-1"], ["--base-version", "x"], ["--run-id", "a\nb"]])
def test_a_wrong_word_is_a_wrong_command_line(pair: tuple[Policy, Policy], words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        weights("diff", "base.safetensors", "new.safetensors", "-o", "d.safetensors", *words)
    assert ended.value.code == 2


def test_an_index_with_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "\\ud800.safetensors"}}')
    assert weights("verify", tmp_path) == 65


def test_the_wrong_base_is_named(pair: tuple[Policy, Policy], capsys: pytest.CaptureFixture[str]) -> None:
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "d.safetensors") == 0
    assert weights("apply", "new.safetensors", "d.safetensors", "-o", "o.safetensors") == 65
    assert "new.safetensors: the base is not" in capsys.readouterr().err


@pytest.fixture
def few_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_checkpoint_of_many_tensors_needs_one_file(tmp_path: Path, few_files: None) -> None:
    """As of a mixture of experts: a thousand tensors and more."""
    before = {f"layer.{number}": tensor("BF16", [number, 2]) for number in range(1200)}
    after = {**before, "layer.7": tensor("BF16", [7, 3])}
    write_weights(before, tmp_path / "base.safetensors")
    write_weights(after, tmp_path / "new.safetensors")
    delta = tmp_path / "d.safetensors"
    assert weights("diff", tmp_path / "base.safetensors", tmp_path / "new.safetensors", "-o", delta) == 0
    assert weights("verify", delta, "--base", tmp_path / "base.safetensors") == 0


def test_a_terminated_apply_leaves_nothing(pair: tuple[Policy, Policy], tmp_path: Path) -> None:
    """SIGTERM while a file is being written."""
    assert weights("diff", "base.safetensors", "new.safetensors", "-o", "d.safetensors") == 0
    before = contents(tmp_path)
    code = (
        "import os, signal, sys; from services.cli import main; from services.runtime import files\n"
        "def sync(descriptor): print('writing', flush=True); signal.pause()\n"
        "files.os.fsync = sync\n"
        "sys.exit(main(['weights', 'apply', 'base.safetensors', 'd.safetensors', '-o', 'o.safetensors']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 128 + signal.SIGTERM
    assert contents(tmp_path) == before

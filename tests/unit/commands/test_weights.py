"""`heterorl weights` on files and Hugging Face folders: what it writes, prints, and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from services.cli import main
from services.wire.delta import BitTensor, layout, read_weights, root_of, write_weights
from services.wire.delta.container import HEADER_LENGTH
from tests.unit.wire.delta.samples import model, nudged, same, tensor

Pair = tuple[dict[str, BitTensor], dict[str, BitTensor]]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """base.safetensors and new.safetensors in tmp_path."""
    rng = np.random.default_rng(0)
    base = model(rng)
    new = nudged(rng, base, 0.02)
    write_weights(base, tmp_path / "base.safetensors")
    write_weights(new, tmp_path / "new.safetensors")
    return base, new


def weights(*words: object) -> int:
    return main(["weights", *map(str, words)])


@pytest.mark.parametrize("codec", ["sx", "xc"])
def test_apply_after_diff_gives_the_new_weights(pair: Pair, tmp_path: Path, codec: str) -> None:
    base, new, delta, out = (tmp_path / f"{name}.safetensors" for name in ("base", "new", "delta", "out"))
    assert weights("diff", base, new, "-o", delta, "--codec", codec) == 0
    assert weights("apply", base, delta, "-o", out) == 0
    assert same(read_weights(out), pair[1])
    assert weights("verify", delta, "--base", base) == 0
    assert weights("verify", out) == 0


def test_inspect_prints_the_documented_keys(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delta = tmp_path / "delta.safetensors"
    weights("diff", tmp_path / "base.safetensors", tmp_path / "new.safetensors", "-o", delta)
    capsys.readouterr()
    assert weights("inspect", delta, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["codec"] == "sx"
    assert found["bytes"] == delta.stat().st_size
    assert found["changed"] == sum(int((pair[0][name].bits != pair[1][name].bits).sum()) for name in pair[0])
    assert found["parameters"] == sum(tensor.bits.size for tensor in pair[0].values())
    assert found["ratio"] == pytest.approx(found["full_bytes"] / found["bytes"], abs=0.001)
    assert (found["base_root"], found["target_root"]) == (root_of(pair[0]), root_of(pair[1]))


@pytest.mark.parametrize("target", ["delta.safetensors", "delta"])
def test_a_delta_of_several_parts_is_written_and_found_again(
    pair: Pair, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout, "PART_BYTES", 4096)
    base, delta, out = tmp_path / "base.safetensors", tmp_path / target, tmp_path / "out.safetensors"
    assert weights("diff", base, tmp_path / "new.safetensors", "-o", delta) == 0
    assert len(list(tmp_path.rglob("delta-*-of-*.safetensors"))) > 3
    monkeypatch.undo()
    assert weights("diff", base, tmp_path / "new.safetensors", "-o", delta) == 0, "parts of the first one are replaced"
    assert weights("apply", base, delta, "-o", out) == 0
    assert same(read_weights(out), pair[1])


def test_a_hugging_face_folder_keeps_its_configuration(pair: Pair, tmp_path: Path) -> None:
    folder, out, delta = tmp_path / "hf", tmp_path / "out", tmp_path / "delta.safetensors"
    folder.mkdir()
    names = sorted(pair[0])
    halves = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in halves.items():
        write_weights({name: pair[0][name] for name in part}, folder / file)
    mapping = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    (folder / "config.json").write_text("{}")
    assert weights("diff", folder, tmp_path / "new.safetensors", "-o", delta) == 0
    assert weights("apply", folder, delta, "-o", out) == 0
    assert (out / "config.json").read_text() == "{}"
    assert not (out / "model.safetensors.index.json").exists()
    assert same(read_weights(out), pair[1])
    with safe_open(out / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(names)


def test_diff_never_removes_files_that_are_not_deltas(pair: Pair, tmp_path: Path) -> None:
    shard = tmp_path / "delta-00001-of-00002.safetensors"
    write_weights(pair[0], shard)
    assert (
        weights(
            "diff", tmp_path / "base.safetensors", tmp_path / "new.safetensors", "-o", tmp_path / "delta.safetensors"
        )
        == 0
    )
    assert same(read_weights(shard), pair[0])


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["diff", "nowhere", "new.safetensors", "-o", "d.safetensors"], 66, "nowhere"),
        (["apply", "base.safetensors", "nowhere", "-o", "o.safetensors"], 66, "nowhere"),
        (["inspect", "base.safetensors"], 65, "not a weight update"),
        (["inspect", "text.safetensors"], 65, "safetensors"),
        (["diff", "base.safetensors", "other.safetensors", "-o", "d.safetensors"], 65, "another model"),
        (["diff", "base.safetensors", "new.safetensors", "-o", "new.safetensors"], 2, "somewhere else"),
        (["diff", "base.safetensors", "new.safetensors", "-o", "no/such/d.safetensors"], 74, "cannot write"),
        (["diff", "folder", "new.safetensors", "-o", "d.safetensors"], 66, "Hugging Face"),
        (["verify", "base.safetensors", "--workers", "0"], 2, "--workers"),
        (["apply", "new.safetensors", "delta.safetensors", "-o", "o.safetensors"], 65, "base"),
        (["apply", "base.safetensors", "cut.safetensors", "-o", "o.safetensors"], 65, "cut.safetensors: the file is"),
        (["apply", "base.safetensors", "delta.safetensors", "-o", "base.safetensors/o"], 74, "cannot make the folder"),
        (
            ["apply", "delta.safetensors", "base.safetensors", "-o", "o.safetensors"],
            65,
            "is a weight update, not weights",
        ),
    ],
)
def test_each_mistake_is_one_sentence_and_its_exit_code(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.safetensors").write_text("these are not weights at all")
    Path("folder").mkdir()
    write_weights({"other": pair[0]["model.norm.weight"]}, "other.safetensors")
    weights("diff", "base.safetensors", "new.safetensors", "-o", "delta.safetensors")
    Path("cut.safetensors").write_bytes(Path("delta.safetensors").read_bytes()[:-7])
    capsys.readouterr()
    assert weights(*words) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("o.safetensors").exists()


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../escape.safetensors", "/etc/passwd", "a/b.safetensors", "x\0.safetensors", "model.bin", 7):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        assert weights("verify", tmp_path) == 65
        assert "which is not a .safetensors file beside it" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "base.safetensors"
    data = path.read_bytes()
    for length in (0, HEADER_LENGTH.size, 100, len(data) - 1):
        path.write_bytes(data[:length])
        assert weights("verify", path) == 65
        assert str(path) in capsys.readouterr().err


AWKWARD = {
    "packed.qweight": tensor("U8", range(256)),  # two 4-bit weights per byte
    "fp8.weight": tensor("F8_E4M3", range(256)),
    "nan.weight": tensor("BF16", [0x7FC1, 0xFFFF, 0x8000, 0x0001, 0x7F80]),
    "scalar": tensor("F32", [0x7F80_0001], ()),
    "none": tensor("F16", [], (0, 4)),
}


@pytest.mark.parametrize("codec", ["sx", "xc"])
@pytest.mark.parametrize("step", [0, 1, 0x81])
def test_awkward_types_and_values_come_back_bit_for_bit(tmp_path: Path, codec: str, step: int) -> None:
    base, new, delta, out = (tmp_path / f"{name}.safetensors" for name in ("base", "new", "delta", "out"))
    write_weights(AWKWARD, base)
    changed = {
        name: BitTensor(dtype=old.dtype, shape=old.shape, bits=old.bits + old.bits.dtype.type(step))
        for name, old in AWKWARD.items()
    }
    write_weights(changed, new)
    assert weights("diff", base, new, "-o", delta, "--codec", codec) == 0
    assert weights("apply", base, delta, "-o", out) == 0
    assert out.read_bytes() == new.read_bytes()
    assert weights("verify", delta, "--base", base) == 0


def test_a_model_without_tensors_has_a_delta_too(tmp_path: Path) -> None:
    empty, delta, out = (tmp_path / f"{name}.safetensors" for name in ("empty", "delta", "out"))
    write_weights({}, empty)
    assert weights("diff", empty, empty, "-o", delta) == 0
    assert weights("apply", empty, delta, "-o", out) == 0
    assert read_weights(out) == {}


def test_an_empty_word_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        weights("diff", tmp_path / "base.safetensors", tmp_path / "new.safetensors", "-o", "")
    assert ended.value.code == 2

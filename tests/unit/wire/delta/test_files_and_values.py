"""Checkpoints on disk, and which weights may be loaded into a model."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from services.runtime.errors import CorruptObjectError, InputMissingError, InvalidWeightsError, StorageError
from services.wire.delta import BitTensor, encode_keyframe, read_weights, validate_names_shapes, write_weights
from services.wire.delta.container import HEADER_LENGTH
from services.wire.delta.validate import is_finite
from tests.unit.wire.delta.samples import model, same, tensor


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_come_back_from_a_file_read_or_mapped(tmp_path: Path, mapped: bool) -> None:
    weights = model(np.random.default_rng(0))
    write_weights(weights, tmp_path / "model.safetensors")
    assert same(read_weights(tmp_path, mapped=mapped), weights)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_safetensors_library_reads_our_checkpoints_and_our_parts(tmp_path: Path) -> None:
    weights = model(np.random.default_rng(0))
    write_weights({k: v for k, v in weights.items() if v.dtype != "BF16"}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("model.norm.weight").view(np.uint32), weights["model.norm.weight"].bits)
    (part,) = encode_keyframe(weights, run_id="run", version=0).parts
    (tmp_path / "part.safetensors").write_bytes(part)
    with safe_open(tmp_path / "part.safetensors", "np") as file:
        assert {"__table__", "__digests__", "model.embed_tokens.weight@0"} <= set(file.keys())
        assert file.metadata()["format"] == "heterorl-weights/1"


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = tmp_path / "there-is-no-such-folder" / "w.safetensors"
    else:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        target = tmp_path / "w.safetensors"
    with pytest.raises(StorageError, match="cannot write"):
        write_weights({"w": tensor("BF16", [1])}, target)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_folder_or_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"nothing\.safetensors"):
        read_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(InputMissingError, match=r"model\.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":{"w":"gone.safetensors"}}')
    with pytest.raises(InputMissingError, match=r"gone\.safetensors"):
        read_weights(tmp_path)


def test_an_index_that_names_a_tensor_that_its_files_lack_is_refused(tmp_path: Path) -> None:
    write_weights({"w": tensor("BF16", [1])}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map":{"w":"a.safetensors","v":"a.safetensors"}}')
    with pytest.raises(CorruptObjectError, match="v is in the index"):
        read_weights(tmp_path)


def test_an_index_that_names_another_file_than_a_tensors_own_is_refused(tmp_path: Path) -> None:
    weights = model(np.random.default_rng(8))
    names = sorted(weights)
    write_weights({name: weights[name] for name in names[:2]}, tmp_path / "one.safetensors")
    write_weights({name: weights[name] for name in names[2:]}, tmp_path / "two.safetensors")
    mapping = {name: "one.safetensors" if name in names[:2] else "two.safetensors" for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": mapping}))
    assert same(read_weights(tmp_path), weights)
    index.write_text(json.dumps({"weight_map": {**mapping, names[0]: "two.safetensors"}}))
    with pytest.raises(CorruptObjectError, match="not where the index says"):
        read_weights(tmp_path)


def test_a_name_that_is_no_parameters_is_refused_with_its_file(tmp_path: Path) -> None:
    write_weights({"a": tensor("U8", [1])}, tmp_path / "x.safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"a":', b'"/":'))
    with pytest.raises(InvalidWeightsError, match=r"x\.safetensors: '/' is not a parameter name"):
        read_weights(path)


def test_repeated_keys_in_a_checkpoint_header_are_refused(tmp_path: Path) -> None:
    entry = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = b'{"w":' + entry + b',"w":' + entry + b"}"
    (tmp_path / "w.safetensors").write_bytes(HEADER_LENGTH.pack(len(header)) + header + b"\0")
    with pytest.raises(CorruptObjectError, match="repeats a key"):
        read_weights(tmp_path / "w.safetensors")


INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000, "F8_E5M2": 0x7C}


@pytest.mark.parametrize("dtype", sorted(INFINITE))
def test_infinities_and_nans_are_found_and_the_largest_number_is_not(dtype: str) -> None:
    infinity = INFINITE[dtype]
    sign = 1 << (tensor(dtype, [0]).bits.dtype.itemsize * 8 - 1)
    for bits in (infinity, infinity + 1, infinity | sign, (infinity + 1) | sign):
        assert not is_finite(tensor(dtype, [0, bits, 0]))
    for bits in (0, sign, 1, infinity - 1, (infinity - 1) | sign):
        assert is_finite(tensor(dtype, [0, bits, 0]))


@pytest.mark.parametrize(("dtype", "nan"), [("F8_E4M3", 0x7F), ("F8_E4M3", 0xFF), ("F8_E8M0", 0xFF)])
def test_nans_of_types_without_infinity_are_found(dtype: str, nan: int) -> None:
    assert not is_finite(tensor(dtype, [1, nan]))
    assert is_finite(tensor(dtype, [1, 0x7E, 0xFE]))


@pytest.mark.parametrize(
    ("before", "after", "exploded"),
    [
        (0x3F00, 0x3F80, False),  # 0.5 to 1: nothing up to 1 is an explosion
        (0x0000, 0x3F80, False),
        (0x0000, 0x3F81, True),
        (0x4000, 0x4200, False),  # 2 to 32: sixteen times
        (0x4000, 0x4201, True),
        (0x4000, 0xC201, True),
        (0xC000, 0xC200, False),
    ],
)
def test_a_magnitude_beyond_one_that_grows_more_than_sixteen_fold_is_an_explosion(
    before: int, after: int, exploded: bool
) -> None:
    old = {"w": tensor("BF16", [1, before])}
    new = {"w": tensor("BF16", [after, 1])}
    if not exploded:
        validate_names_shapes(new, old)
        return
    with pytest.raises(InvalidWeightsError, match="w grew more than 16-fold"):
        validate_names_shapes(new, old)


def test_weights_that_must_not_be_loaded_are_refused_with_the_name_of_the_tensor() -> None:
    reference = model(np.random.default_rng(0))
    validate_names_shapes(dict(reference), reference)
    poisoned = reference["model.norm.weight"].bits.copy()
    poisoned[3] = 0x7FC0_0000
    for name, bad in {
        "model.norm.weight": BitTensor(dtype="F32", shape=(60,), bits=poisoned),
        "model.extra": tensor("BF16", [1]),
        "model.steps": tensor("I64", [7], (1, 1)),
    }.items():
        with pytest.raises(InvalidWeightsError, match=name):
            validate_names_shapes({**reference, name: bad}, reference)
    with pytest.raises(InvalidWeightsError, match=r"lack the tensor model\.unused"):
        validate_names_shapes({k: v for k, v in reference.items() if k != "model.unused"}, reference)

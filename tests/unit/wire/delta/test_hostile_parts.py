"""Damaged and hostile updates (faults 4 to 7 and 10 to 12): refused whole, with our errors, before memory is spent."""

import json
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from services.runtime.errors import BadInputError, CorruptObjectError, InvalidWeightsError
from services.wire.delta import BitTensor, WrongBaseError, apply_update, encode_delta, encode_keyframe, inspect, root_of
from services.wire.delta import layout as layout_module
from services.wire.delta.streams import MAX_WINDOW_BYTES, compress, decompress
from tests.unit.wire.delta.samples import edited, join_part, model, nudged, same, seal, split_part, tensor

Policy = dict[str, BitTensor]
CHUNK = "model.embed_tokens.weight@0"


@pytest.fixture
def base() -> Policy:
    return model(np.random.default_rng(0))


@pytest.fixture
def new(base: Policy) -> Policy:
    return nudged(np.random.default_rng(1), base, 0.05)


@pytest.fixture
def delta(base: Policy, new: Policy) -> bytes:
    (part,) = encode_delta(base, new, run_id="run", base_version=0, target_version=1).parts
    return part


def test_every_flipped_bit_is_found(base: Policy, delta: bytes) -> None:
    for position in range(0, len(delta), 7):
        damaged = bytearray(delta)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(BadInputError):
            apply_update([bytes(damaged)], base)


def test_a_part_cut_or_continued_at_any_length_is_refused(base: Policy, delta: bytes) -> None:
    for damaged in (b"", delta[:7], delta[:8], delta[:300], delta[:-1], delta + b"\0", delta + delta):
        with pytest.raises(CorruptObjectError):
            apply_update([damaged], base)


@pytest.fixture
def sharded(base: Policy, new: Policy, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, ...]:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 4096)
    return encode_delta(base, new, run_id="run", base_version=0, target_version=1).parts


def test_missing_repeated_and_foreign_parts_are_refused(base: Policy, new: Policy, sharded: tuple[bytes, ...]) -> None:
    other = encode_delta(base, new, run_id="another run", base_version=0, target_version=1).parts
    for parts in ((), sharded[1:], (*sharded, sharded[0]), (sharded[0], *sharded[:-1]), (*sharded[:-1], other[-1])):
        with pytest.raises(CorruptObjectError):
            apply_update(parts, base)


def test_a_delta_on_the_wrong_base_asks_for_a_new_plan(base: Policy, new: Policy) -> None:
    for codec in ("sx", "xc"):
        update = encode_delta(base, new, run_id="run", base_version=0, target_version=1, codec=codec)
        with pytest.raises(WrongBaseError, match="not version 0"):
            apply_update(update.parts, new)
        with pytest.raises(WrongBaseError):
            apply_update(update.parts, None)
        one_bit = {name: BitTensor(dtype=t.dtype, shape=t.shape, bits=t.bits.copy()) for name, t in base.items()}
        one_bit["model.norm.weight"].bits[5] ^= np.uint32(1)
        with pytest.raises(WrongBaseError):
            apply_update(update.parts, one_bit)


def test_another_root_than_the_manifest_says_is_refused(base: Policy, new: Policy, delta: bytes) -> None:
    assert same(apply_update([delta], base, expect_root=root_of(new)), new)
    with pytest.raises(CorruptObjectError, match="manifest"):
        apply_update([delta], base, expect_root=root_of(base))


@pytest.mark.parametrize(
    "change",
    [
        lambda policy: policy.pop("model.norm.weight"),
        lambda policy: policy.update({"extra": tensor("BF16", [1])}),
        lambda policy: policy.update({"model.steps": tensor("I64", [7], (1,))}),
        lambda policy: policy.update({"model.steps": tensor("U64", [7], ())}),
    ],
)
def test_unknown_missing_and_misshapen_tensors_are_refused_whole(
    base: Policy, delta: bytes, change: Callable[[Policy], object]
) -> None:
    other = dict(base)
    change(other)
    with pytest.raises(InvalidWeightsError, match="another model"):
        apply_update([delta], other)
    with pytest.raises(InvalidWeightsError, match="another model"):
        encode_delta(base, other, run_id="run", base_version=0, target_version=1)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../b",
        "w\0",
        "x" * 10_000,
        "mоdel.weight",
        "",
        ".",
        "a..b",
        "__metadata__",
        "w ",
    ],
)
def test_names_that_are_not_parameter_names_are_refused(base: Policy, name: str) -> None:
    with pytest.raises(InvalidWeightsError, match="not a parameter name"):
        encode_keyframe({name: tensor("BF16", [1])}, run_id="run", version=0)
    table = compress(json.dumps({"tensors": [[name, "BF16", [1]]], "chunks": [[[0, 0, 1]]]}).encode())
    (part,) = encode_keyframe({"w": tensor("BF16", [1])}, run_id="run", version=0).parts
    with pytest.raises(InvalidWeightsError, match="not a parameter name"):
        inspect([edited(part, entries=lambda blocks: blocks.update(__table__=table))])


def reheaded(part: bytes, change: Callable[[str], str]) -> bytes:
    """The part with its header's text changed, the data as it was, sealed again."""
    length = struct.unpack("<Q", part[:8])[0]
    text = change(part[8 : 8 + length].decode()).encode()
    return seal(struct.pack("<Q", len(text)) + text + part[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.rstrip()[:-1] + ',"__digests__":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        lambda text: text.replace('"shards":"1"', '"shards":"1","shards":"1"'),
        lambda text: text.replace('"shards":"1"', '"shards":1'),
        lambda text: text.replace('"shards":"1"', '"shards":"-1"'),
        lambda text: text.replace('"shards":"1"', '"shards":"99999999999999999999999"'),
        lambda text: text.replace('"shard":"0"', '"shard":"1"'),
        lambda text: text.replace('"kind":"delta"', '"kind":"keyframe"'),
        lambda text: text.replace('"codec":"sx"', '"codec":"keyframe"'),
        lambda text: text.replace('"codec":"sx"', '"codec":"zip"'),
        lambda text: text.replace("heterorl-weights/1", "heterorl-weights/2"),
        lambda text: text.replace('"dtype":"U8"', '"dtype":"F16"', 1),
        lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[1,', 1),
        lambda text: text.replace('"shape":[', '"shape":[-', 1),
        lambda text: text.replace('"shape":[', '"shape":[1e3,', 1),
        lambda text: text.replace('"shape":[', '"shape":[true,', 1),
        lambda text: text.replace('"shape":[', '"shape":[NaN,', 1),
        lambda text: "[" * 100_000,
        lambda text: "{}",
        lambda text: "[]",
        lambda text: '{"w":' + "9" * 5000 + "}",
        lambda text: text + " " * (1 << 20),
    ],
)
def test_a_strange_header_is_refused(base: Policy, delta: bytes, change: Callable[[str], str]) -> None:
    damaged = reheaded(delta, change)
    assert damaged != delta
    with pytest.raises(CorruptObjectError):
        apply_update([damaged], base)


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b"[]",
        b"{}",
        b'{"tensors":[],"chunks":[[]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[[[0,0,1]]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[[[0,0,2]],[[0,0,2]]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[[[0,-1,2]]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[[[0,1,2]]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[[[-1,0,2]]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[[[1,0,2]]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[[[0,0,true]]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[[[0,0]]]}',
        b'{"tensors":[["w","BF16",[2]]],"chunks":[7]}',
        b'{"tensors":[["w","F4",[2]]],"chunks":[[[0,0,2]]]}',
        b'{"tensors":[["w","BF16",[2]],["w","BF16",[2]]],"chunks":[[[0,0,2]]]}',
        b'{"tensors":[["w","BF16",[-2]]],"chunks":[[[0,0,2]]]}',
        b'{"tensors":[["w","BF16",[9000000]]],"chunks":[[[0,0,9000000]]]}',
        b'{"tensors":[["w","BF16",[1099511627776,1099511627776]]],"chunks":[[[0,0,2]]]}',
        b'{"tensors":[["w","BF16",[1,1,1,1,1,1,1,1,2]]],"chunks":[[[0,0,2]]]}',
        b"[" * 100_000,
    ],
)
def test_a_strange_table_is_refused(table: bytes) -> None:
    (part,) = encode_keyframe({"w": tensor("BF16", [1, 2])}, run_id="run", version=0).parts
    with pytest.raises(BadInputError):
        apply_update([edited(part, entries=lambda blocks: blocks.update(__table__=compress(table)))], None)


def bombs() -> list[bytes]:
    """Frames that unpack to 1 GiB of zeros, or say that they do, or ask for a window of 1 GiB."""
    stated = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(bytes(1 << 20)))
    stream = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compressobj()
    unknown = stream.compress(bytes(1 << 20)) + stream.flush()
    parameters = zstandard.ZstdCompressionParameters(window_log=30, write_checksum=True, write_content_size=False)
    wide = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    wide_frame = wide.compress(bytes(100)) + wide.flush()
    lying = bytearray(compress(bytes(100_000)))
    lying[5:9] = struct.pack("<I", 2)
    return [bytes(stated), unknown, wide_frame, bytes(lying)]


@pytest.mark.parametrize("bomb", bombs())
def test_a_zstd_bomb_is_refused_before_it_is_unpacked(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CorruptObjectError):
            decompress(bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_without_checksum_dictionary_or_end_is_refused() -> None:
    plain = zstandard.ZstdCompressor(write_checksum=False).compress(bytes(1000))
    with pytest.raises(CorruptObjectError, match="checksum"):
        decompress(plain, 1000)
    sound = compress(bytes(1000))
    assert decompress(sound, 1000) == bytes(1000)
    for damaged in (sound[:-1], sound + b"\0", sound + sound, b"", b"not zstd at all", sound[:-4] + b"\0\0\0\0"):
        with pytest.raises(CorruptObjectError):
            decompress(damaged, 1000)
    assert MAX_WINDOW_BYTES <= 64 << 20


def test_a_bomb_in_a_chunk_is_refused(base: Policy, delta: bytes) -> None:
    for bomb in bombs():
        for encoding in (1, 2, 3, 4):
            payload = bytes((encoding,)) + struct.pack("<I", 10) + struct.pack("<I", len(bomb) << 1 | 1) + bomb
            with pytest.raises(BadInputError):
                apply_update([edited(delta, entries=lambda blocks, p=payload: blocks.update({CHUNK: p}))], base)


def test_a_chunk_that_the_table_does_not_name_is_refused(base: Policy, delta: bytes) -> None:
    with pytest.raises(CorruptObjectError, match="does not name"):
        apply_update([edited(delta, entries=lambda blocks: blocks.update({"model.norm.weight@7": b"\3"}))], base)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text[:-1] + b',"chunks":[]}', "a key is repeated"),
        (lambda text: _with(text, lambda table: table["tensors"][0].pop()), "not described by name, type and shape"),
        (lambda text: _with(text, lambda table: table["chunks"][0][0].pop()), "not described by the numbers"),
        (lambda text: _with(text, lambda table: table["chunks"][0][0].__setitem__(0, 99)), "not described by the num"),
        (lambda text: _with(text, lambda table: table["chunks"].append(table["chunks"][0])), "names a chunk twice"),
    ],
)
def test_a_table_that_is_no_table_is_refused_in_our_words(
    base: Policy, delta: bytes, edit: Callable[[bytes], bytes], words: str
) -> None:
    def change(blocks: dict[str, bytes]) -> None:
        blocks["__table__"] = compress(edit(decompress(blocks["__table__"], 1 << 20)))

    with pytest.raises(CorruptObjectError, match=words):
        apply_update([edited(delta, entries=change)], base)


def _with(text: bytes, change: Callable[[dict[str, list[list[object]]]], object]) -> bytes:
    table = json.loads(text)
    change(table)
    return json.dumps(table).encode()


def test_digests_that_do_not_make_the_root_are_refused(base: Policy, delta: bytes) -> None:
    zeros = bytes(len(split_part(delta)[1]["__digests__"]))
    with pytest.raises(CorruptObjectError, match="root"):
        apply_update([edited(delta, entries=lambda blocks: blocks.update(__digests__=zeros))], base)


def test_chunks_in_each_others_place_are_refused(base: Policy, delta: bytes) -> None:
    def swap(blocks: dict[str, bytes]) -> None:
        first, second = "model.embed_tokens.weight@0", "model.norm.weight@0"
        blocks[first], blocks[second] = blocks[second], blocks[first]

    with pytest.raises(BadInputError):
        apply_update([edited(delta, entries=swap)], base)


def test_a_keyframe_without_one_of_its_chunks_is_refused(base: Policy) -> None:
    (part,) = encode_keyframe(base, run_id="run", version=0).parts
    damaged = edited(part, entries=lambda blocks: blocks.pop("model.norm.weight@0"))
    with pytest.raises(CorruptObjectError, match="lacks"):
        apply_update([damaged], base)


def test_a_keyframe_is_of_values_alone_and_names_no_base(base: Policy, delta: bytes) -> None:
    (part,) = encode_keyframe(base, run_id="run", version=0).parts
    changes = split_part(delta)[1][CHUNK]
    with pytest.raises(CorruptObjectError, match="in the place of values"):
        apply_update([edited(part, entries=lambda blocks: blocks.update({CHUNK: changes}))], None)
    with pytest.raises(CorruptObjectError, match="contradicts"):
        apply_update([edited(part, metadata=lambda fields: fields.update(base_version="0"))], None)


def test_a_huge_claim_is_refused_before_the_result_is_allocated() -> None:
    (part,) = encode_keyframe({"w": tensor("BF16", [1, 2])}, run_id="run", version=0).parts
    header, blocks = split_part(part)
    blocks["__table__"] = compress(b'{"tensors":[["w","BF16",[1000000000000]]],"chunks":[[[0,0,2]]]}')
    tracemalloc.start()
    try:
        with pytest.raises(CorruptObjectError):
            apply_update([join_part(header["__metadata__"], blocks)], None)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_metadata_of_a_sealed_part_must_agree_with_its_contents(base: Policy, delta: bytes) -> None:
    wrong = {"parameters": "1", "full_bytes": "1", "changed": "99999", "base_root": "0" * 63, "target_root": "G" * 64}
    for key, value in wrong.items():
        with pytest.raises(CorruptObjectError):
            apply_update([edited(delta, metadata=lambda fields, k=key, v=value: fields.update({k: v}))], base)
    with pytest.raises(CorruptObjectError):
        apply_update([edited(delta, metadata=lambda fields: fields.pop("base_version"))], base)

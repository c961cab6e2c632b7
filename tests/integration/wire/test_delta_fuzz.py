"""Whatever the bytes, decoding raises one of our errors or returns weights with the root that was asked for."""

import json
from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.errors import BadInputError
from services.wire.delta import BitTensor, Codec, apply_update, encode_delta, encode_keyframe, inspect, root_of
from services.wire.delta.codec import HostComparison, decode_chunk, encode_change
from services.wire.delta.container import HEADER_LENGTH, header_bytes, parse_header
from services.wire.delta.density import Encoding
from services.wire.delta.layout import Chunk, Segment
from services.wire.delta.sparse import Changes
from services.wire.delta.streams import compress, decompress
from tests.unit.wire.delta.samples import edited, model, nudged, seal, split_part

Policy = dict[str, BitTensor]
EDIT = st.tuples(
    st.sampled_from(["flip", "insert", "delete", "copy"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
)
EDITS = st.lists(EDIT, min_size=1, max_size=4)
KINDS = st.sampled_from(["keyframe", "sx", "xc"])


@cache
def versions() -> tuple[Policy, Policy, str]:
    base = model(np.random.default_rng(0))
    new = nudged(np.random.default_rng(1), base, 0.08)
    return base, new, root_of(new)


@cache
def sound_part(kind: str) -> bytes:
    base, new, _ = versions()
    if kind == "keyframe":
        return encode_keyframe(new, run_id="run", version=1).parts[0]
    return encode_delta(base, new, run_id="run", base_version=0, target_version=1, codec=kind).parts[0]


def mutate(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for action, where, extra in edits:
        at = int(where * max(len(data) - 1, 0))
        match action:
            case "flip":
                data = (
                    data[:at] + bytes(a ^ b for a, b in zip(data[at:], extra, strict=False)) + data[at + len(extra) :]
                )
            case "insert":
                data = data[:at] + extra + data[at:]
            case "delete":
                data = data[:at] + data[at + len(extra) :]
            case _:
                data = data[:at] + data[: len(extra)] + data[at + len(extra) :]
    return data


def decode_or_refuse(part: bytes) -> None:
    base, _, root = versions()
    try:
        result = apply_update([part], base, expect_root=root)
    except BadInputError:
        return
    assert root_of(result) == root


@settings(max_examples=80, deadline=None)
@given(kind=KINDS, edits=EDITS)
def test_mutated_files_are_refused_or_right(kind: str, edits: list[tuple[str, float, bytes]]) -> None:
    decode_or_refuse(mutate(sound_part(kind), edits))


@settings(max_examples=100, deadline=None)
@given(kind=KINDS, edits=EDITS, within=st.floats(0, 1))
def test_mutated_headers_with_a_valid_check_are_refused_or_right(
    kind: str, edits: list[tuple[str, float, bytes]], within: float
) -> None:
    part = sound_part(kind)
    length = HEADER_LENGTH.size + HEADER_LENGTH.unpack(part[:8])[0]
    cut = int(within * length)
    text = mutate(part[cut:length], edits)
    decode_or_refuse(seal(part[:cut] + text + part[length:]))


@settings(max_examples=120, deadline=None)
@given(kind=KINDS, entry=st.integers(0, 20), edits=EDITS)
def test_mutated_entries_with_a_valid_check_are_refused_or_right(
    kind: str, entry: int, edits: list[tuple[str, float, bytes]]
) -> None:
    part = sound_part(kind)
    names = list(split_part(part)[1])
    name = names[entry % len(names)]
    decode_or_refuse(edited(part, entries=lambda blocks: blocks.update({name: mutate(blocks[name], edits)})))


@cache
def sound_xc_chunk() -> tuple[Policy, Chunk, bytes]:
    """A chunk with rows of every kind: several groups, changes of one and of many, numbers far beyond their row."""
    rng = np.random.default_rng(2)
    bits = (rng.integers(100, 125, 20_000) << 7).astype(np.uint16)
    hit = rng.random(bits.size) < 2.0 ** (103.0 - (bits >> 7))
    far = rng.choice(np.array([1, 65535, 1, 65535, 3, 40, 20_000], np.uint16), bits.size)
    base, new = ({"w": BitTensor(dtype="BF16", shape=(bits.size,), bits=b)} for b in (bits, bits + hit * far))
    chunk = Chunk(dtype="BF16", segments=(Segment(name="w", start=0, count=bits.size),))
    payload, _ = encode_change(HostComparison(base=base, new=new), chunk, Codec.XC)
    assert payload[0] == Encoding.XC
    return base, chunk, payload


@settings(max_examples=300, deadline=None)
@given(edits=EDITS, within=st.floats(0, 1))
def test_mutated_xc_chunks_are_refused_or_changes_of_their_elements(
    edits: list[tuple[str, float, bytes]], within: float
) -> None:
    base, chunk, payload = sound_xc_chunk()
    cut = 1 + int(within * 90)
    for damaged in (payload[:cut] + mutate(payload[cut:], edits), mutate(payload[:cut], edits) + payload[cut:]):
        try:
            decoded = decode_chunk(memoryview(damaged), chunk, base)
        except BadInputError:
            continue
        if damaged[0] == Encoding.XC and isinstance(decoded, Changes):
            assert decoded.positions.size == decoded.differences.size
            assert decoded.positions.size == 0 or decoded.positions[-1] < chunk.count
            assert np.all(np.diff(decoded.positions) > 0)
            assert np.all(decoded.differences != 0)


@settings(max_examples=80, deadline=None)
@given(edits=EDITS)
def test_mutated_tables_inside_a_sound_frame_are_refused_or_right(edits: list[tuple[str, float, bytes]]) -> None:
    part = sound_part("sx")
    table = decompress(split_part(part)[1]["__table__"], 1 << 20)
    frame = compress(mutate(table, edits))
    decode_or_refuse(edited(part, entries=lambda blocks: blocks.update(__table__=frame)))


@settings(max_examples=80, deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for attempt in (data, HEADER_LENGTH.pack(len(data)) + data):
        try:
            inspect([attempt])
        except BadInputError:
            continue
        raise AssertionError("arbitrary bytes were taken for an update")


@settings(max_examples=80, deadline=None)
@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "w"]), inner, max_size=5
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_header_is_parsed_or_refused(document: object) -> None:
    text = json.dumps(document).encode()
    try:
        header = parse_header(text[: header_bytes(HEADER_LENGTH.pack(len(text)), len(text) + 8)], len(text) + 8)
    except BadInputError:
        return
    assert all(entry.start == entry.stop for entry in header.entries.values())

"""XC: every pattern comes back; even changes cost little more than their entropy; hostile chunks are refused."""

import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from services.runtime.errors import CorruptObjectError
from services.wire.delta.codec import Codec, HostComparison, Whole, decode_chunk, encode_change, write_chunk
from services.wire.delta.conditioned import MAX_GROUPS, choose_limits, pack_by_exponent, read_by_exponent
from services.wire.delta.density import Encoding
from services.wire.delta.exponents import EXPONENT_SHIFT, HostExponents
from services.wire.delta.layout import Chunk, Segment
from services.wire.delta.sparse import scan
from services.wire.delta.streams import StreamReader, varint
from services.wire.delta.tensors import BITS_TYPE, ITEM_BYTES, BitTensor
from tests.unit.wire.delta.samples import normal_bf16, tensor

COUNT = 20_000


def pair(dtype: str, pattern: str, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    """Bits of a base, and of the base changed in some way."""
    rng = np.random.default_rng(7)
    kind = BITS_TYPE[ITEM_BYTES[dtype]]
    width = 8 * ITEM_BYTES[dtype]
    spread = np.clip(rng.normal(0.45, 0.02, count), 0, 1) * (2.0 ** (width - 1) - 1)
    base = (spread.astype(np.uint64) | rng.integers(0, 2, count).astype(np.uint64) << np.uint64(width - 1)).astype(kind)
    step = rng.choice([-1, 1], count)
    hit = {
        "one": np.arange(count) == count // 2,
        "first": np.arange(count) == 0,
        "last": np.arange(count) == count - 1,
        "few": rng.random(count) < 0.004,
        "half": rng.random(count) < 0.5,
        "all but one": np.arange(count) != 5,
        "all": np.ones(count, bool),
        "rows": (np.arange(count) // 1000 % 7 == 3) & (rng.random(count) < 0.2),
        "far": rng.random(count) < 0.02,
        "anything": rng.random(count) < 0.3,
    }[pattern]
    if pattern == "far":
        step *= rng.choice([1, 2, 300, 2 ** (width - 1) - 1], count)
    if pattern == "anything":
        step = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), count)
    new = (base.astype(np.int64) + step * hit).astype(kind)
    return base, new


PATTERNS = ["one", "first", "last", "few", "half", "all but one", "all", "rows", "far", "anything"]


@pytest.mark.parametrize("count", [1, 2, 65, COUNT])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", sorted(EXPONENT_SHIFT))
def test_every_pattern_of_changes_comes_back_through_xc_itself(dtype: str, pattern: str, count: int) -> None:
    """Not only through the encoding that the encoder would keep."""
    base, new = pair(dtype, pattern, count)
    payload = pack_by_exponent(HostExponents(pieces=[base], shift=EXPONENT_SHIFT[dtype]), scan(base, new))
    cut = count // 3
    reader = StreamReader(memoryview(payload))
    decoded = read_by_exponent(reader, [base[:cut], base[cut:]], dtype)
    reader.end()
    chunk = Chunk(dtype=dtype, segments=(Segment(name="w", start=0, count=count),))
    out = {"w": tensor(dtype, np.zeros(count))}
    write_chunk(decoded, chunk, {"w": tensor(dtype, base)}, out)
    assert np.array_equal(out["w"].bits, new)


def chosen(base: np.ndarray, new: np.ndarray, codec: Codec) -> bytes:
    chunk = Chunk(dtype="BF16", segments=(Segment(name="w", start=0, count=base.size),))
    weights = [{"w": BitTensor(dtype="BF16", shape=(bits.size,), bits=bits)} for bits in (base, new)]
    payload, _ = encode_change(HostComparison(base=weights[0], new=weights[1]), chunk, codec)
    assert not isinstance(decode_chunk(memoryview(payload), chunk, weights[0]), Whole)
    return payload


def test_a_step_of_an_optimizer_costs_three_per_cent_more_than_its_entropy() -> None:
    """The chance of a change halves with each exponent, as where every weight moves by as much."""
    rng = np.random.default_rng(3)
    base = normal_bf16(rng, 1 << 20)
    exponents = (base >> np.uint16(7) & np.uint16(255)).astype(int)
    chance = np.minimum(2.0 ** (112.0 - exponents), 0.5)
    hit = rng.random(base.size) < chance
    new = base + np.where(hit, rng.choice(np.array([1, 65535], np.uint16), base.size), 0).astype(np.uint16)
    entropy = -(chance * np.log2(chance) + (1 - chance) * np.log2(1 - chance)).sum() + hit.sum()
    payload = chosen(base, new, Codec.XC)
    assert payload[0] == Encoding.XC
    assert 8 * len(payload) < 1.03 * entropy
    assert len(payload) < 0.8 * len(chosen(base, new, Codec.SX))


def test_changes_in_few_rows_are_no_larger_than_as_sx() -> None:
    rng = np.random.default_rng(4)
    base = normal_bf16(rng, 1 << 20)
    touched = np.repeat(rng.random(1024) < 0.02, 1024)
    new = base + (touched & (rng.random(base.size) < 0.3)).astype(np.uint16)
    assert len(chosen(base, new, Codec.XC)) <= len(chosen(base, new, Codec.SX))


def test_limits_are_few_and_rise_whatever_occurs() -> None:
    rng = np.random.default_rng(5)
    sampled = rng.integers(0, 256, 5000).astype(np.uint8)
    changed = np.repeat(np.arange(256), rng.integers(0, 4000, 256)).astype(np.uint8)
    limits = choose_limits(sampled, changed, np.ones(changed.size, np.uint16), 5000 * 127)
    assert 0 < len(limits) <= MAX_GROUPS
    assert all(low < high for low, high in zip([0, *limits], limits, strict=False))
    nothing = np.zeros(0, np.uint8)
    assert choose_limits(nothing, nothing, np.zeros(0, np.uint16), 0) == []


BASE = np.full(1000, 0x3C00, np.uint16)


def rows(unary: bytes, rest: bytes = b"") -> bytes:
    return varint(len(unary)) + unary + rest


def hostile() -> Iterator[tuple[str, bytes]]:
    one = varint(2)
    yield "nothing", b""
    yield "more limits than bytes", b"\x05\x01\x02"
    yield "65 limits", bytes((65, *range(1, 66))) + varint(1) * 66 + rows(b"")
    yield "falling limits", b"\x02\x09\x05" + varint(1) * 3 + rows(b"")
    yield "equal limits", b"\x02\x09\x09" + varint(1) * 3 + rows(b"")
    yield "a limit of 0", b"\x01\x00" + varint(1) * 2 + rows(b"")
    yield "fewer heads than groups", b"\x01\x09" + varint(1)
    yield "more changes than elements", b"\0" + varint(1002) + b"\0" + varint(0) + rows(b"")
    yield "2^34 changes", b"\0" + varint(1 << 34) + b"\0" + varint(0) + rows(b"")
    yield "more far changes than changes", b"\0" + one + b"\0" + varint(2) + b"\0\0" + rows(b"\x80")
    yield "k of 32", b"\0" + one + b"\x20" + varint(0) + rows(b"\x80", b"\0\0\0\0\0")
    yield "k of 31 for every element", b"\0" + varint(501) + b"\x1f" + varint(0) + rows(b"\xff" * 63, bytes(2000))
    yield "a position behind the group", b"\0" + one + b"\x0a" + varint(0) + rows(b"\x80", b"\xff\xc0\0")
    yield "a change in an empty group", b"\x01\x01" + one + b"\0" + varint(0) + varint(1) + rows(b"\x80", b"\0")
    yield "no signs", b"\0" + one + b"\0" + varint(0) + rows(b"\x80")
    yield "a second sign", b"\0" + one + b"\0" + varint(0) + rows(b"\x80", b"\x40")
    yield "bytes at the end", b"\0" + one + b"\0" + varint(0) + rows(b"\x80", b"\0\0")
    yield "a difference of 2^15 + 1", b"\0" + one + b"\0" + varint(1) + b"\0\x0f" + rows(b"\xa0", b"\xff\xfe\0")
    yield "SPLIT that is a bomb", b"\0" + varint(0) + rows(b"") + struct.pack("<I", 2**32 - 1) + b"\0" * 9
    yield "SPLIT that is not there", b"\0" + varint(0) + rows(b"")


@pytest.mark.parametrize("payload", [pytest.param(payload, id=name) for name, payload in hostile()])
def test_a_hostile_chunk_is_refused_before_memory_is_spent(payload: bytes) -> None:
    chunk = Chunk(dtype="BF16", segments=(Segment(name="w", start=0, count=BASE.size),))
    base = {"w": tensor("BF16", BASE)}
    tracemalloc.start()
    try:
        with pytest.raises(CorruptObjectError):
            decode_chunk(memoryview(bytes((Encoding.XC,)) + payload), chunk, base)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_sound_chunk_like_the_hostile_ones_is_read() -> None:
    chunk = Chunk(dtype="BF16", segments=(Segment(name="w", start=0, count=BASE.size),))
    payload = bytes((Encoding.XC,)) + b"\0" + varint(2) + b"\x02" + varint(0) + rows(b"\x20", b"\x40\x80")
    decoded = decode_chunk(memoryview(payload), chunk, {"w": tensor("BF16", BASE)})
    out = {"w": tensor("BF16", np.zeros(BASE.size))}
    write_chunk(decoded, chunk, {"w": tensor("BF16", BASE)}, out)
    changed = np.flatnonzero(out["w"].bits != BASE)
    assert (changed.tolist(), out["w"].bits[changed].tolist()) == ([10], [0x3BFF])


def test_xc_in_a_type_without_exponents_is_refused() -> None:
    chunk = Chunk(dtype="I16", segments=(Segment(name="w", start=0, count=1000),))
    with pytest.raises(CorruptObjectError):
        decode_chunk(memoryview(bytes((Encoding.XC, 0, 1, 0))), chunk, {"w": tensor("I16", BASE)})

"""SX: the elements that changed, as gaps between them and signed differences of their bit patterns.

    gaps        u8, 255 means "255 more, and the gap goes on"; a gap counts the unchanged elements before a change
    signs       one bit per change, most significant first: 1 is negative
    big gaps    as gaps, over the changes: which differ by more than 1
    big sizes   |difference| - 2 of those, one stream per byte

Differences are taken modulo 2^bits, so that they add: consecutive deltas fold without the weights (`fold.py`).
"""

from dataclasses import dataclass

import numpy as np

from services.runtime.errors import CorruptObjectError
from services.wire.delta.streams import LENGTH, Bytes8, StreamReader, pack, pack_planes, read_planes
from services.wire.delta.tensors import Bits

ESCAPE = 255
SCAN_ELEMENTS = 128 << 10
"""Two blocks of bf16 and their flags stay in a core's own cache."""

Positions = np.ndarray[tuple[int], np.dtype[np.int64]]
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Changes:
    """What changed among `count` elements: rising positions, and new - base of the bits modulo 2^bits, never 0."""

    count: int
    positions: Positions
    differences: Bits


def scan(base: Bits, new: Bits, offset: int = 0) -> Changes:
    """Compares in blocks that stay in the cache: twice as fast as one comparison of the whole.

    `offset` is added to the positions.
    """
    flags = np.empty(min(SCAN_ELEMENTS, base.size), np.bool_)
    positions: list[Positions] = []
    differences: list[Bits] = []
    for start in range(0, base.size, SCAN_ELEMENTS):
        before, after = base[start : start + SCAN_ELEMENTS], new[start : start + SCAN_ELEMENTS]
        block = flags[: before.size]
        np.not_equal(before, after, out=block)
        found = block.nonzero()[0]
        differences.append(after[found] - before[found])
        found += start + offset
        positions.append(found)
    if not positions:
        return Changes(count=0, positions=np.zeros(0, np.int64), differences=base[:0])
    return Changes(count=base.size, positions=np.concatenate(positions), differences=np.concatenate(differences))


def add_to(target: Bits, source: Bits, positions: Positions, differences: Bits) -> None:
    """target = source + differences at the positions, block by block, so that the second write finds the cache warm."""
    starts = range(0, target.size, SCAN_ELEMENTS)
    edges = np.searchsorted(positions, [*starts, target.size])
    for start, first, last in zip(starts, edges[:-1], edges[1:], strict=True):
        block = target[start : start + SCAN_ELEMENTS]
        block[:] = source[start : start + SCAN_ELEMENTS]
        block[positions[first:last] - start] += differences[first:last]


def gaps_of(positions: Positions) -> Bytes8:
    """Rising positions as gap bytes."""
    gaps = np.empty(positions.size, np.uint32)
    gaps[:1] = positions[:1]
    np.subtract(positions[1:], positions[:-1], out=gaps[1:], casting="unsafe")
    gaps[1:] -= np.uint32(1)
    escapes = gaps // np.uint32(ESCAPE)
    rest = (gaps - escapes * np.uint32(ESCAPE)).astype(np.uint8)
    if not escapes.any():
        return rest
    ends = np.cumsum(escapes, dtype=np.int64)
    ends += np.arange(gaps.size)
    coded = np.full(int(ends[-1]) + 1, ESCAPE, np.uint8)
    coded[ends] = rest
    return coded


def positions_of(coded: Bytes8, count: int) -> Positions:
    """The inverse of `gaps_of`. Raises CorruptObjectError where a position lies at or beyond `count`."""
    ends = np.flatnonzero(coded != ESCAPE)
    if coded.size and (ends.size == 0 or ends[-1] != coded.size - 1):
        raise CorruptObjectError("a list of gaps ends inside a gap: fetch the object again")
    positions = np.cumsum(coded, dtype=np.int64)[ends]
    positions += np.arange(ends.size)
    if positions.size and positions[-1] >= count:
        raise CorruptObjectError("a change lies outside its chunk: fetch the object again")
    return positions


def max_gap_bytes(count: int) -> int:
    """No valid list of gaps among `count` elements is longer."""
    return count + count // ESCAPE + 1


def pack_differences(differences: Bits) -> bytes:
    """Signs and sizes of differences that are never 0."""
    signed = differences.view(SIGNED[differences.dtype.itemsize])
    negative = signed < 0
    sizes = np.where(negative, -differences, differences)
    big = np.flatnonzero(sizes != 1)
    signs = pack(np.packbits(negative), try_zstd=False)
    return signs + pack(gaps_of(big)) + pack_planes(sizes[big] - differences.dtype.type(2))


def read_differences(reader: StreamReader, count: int, dtype: "np.dtype[np.unsignedinteger]") -> Bits:
    """The inverse of `pack_differences` for `count` changes."""
    negative = np.unpackbits(reader.exact((count + 7) // 8), count=count).view(np.bool_)
    big = positions_of(reader.stream(max_gap_bytes(count)), count)
    one, two = dtype.type(1), dtype.type(2)
    differences = np.where(negative, -np.ones(1, dtype), one)
    sizes = read_planes(reader, big.size, dtype) + two
    differences[big] = np.where(negative[big], -sizes, sizes)
    return differences


def pack_changes(changes: Changes) -> bytes:
    """The SX payload."""
    number = LENGTH.pack(changes.positions.size)
    return number + pack(gaps_of(changes.positions)) + pack_differences(changes.differences)


def read_changes(reader: StreamReader, count: int, dtype: "np.dtype[np.unsignedinteger]") -> Changes:
    """The inverse of `pack_changes` among `count` elements. Raises CorruptObjectError."""
    changed = reader.number()
    positions = positions_of(reader.stream(max_gap_bytes(count)), count)
    if positions.size != changed:
        raise CorruptObjectError("a chunk has another number of changes than it claims: fetch the object again")
    return Changes(count=count, positions=positions, differences=read_differences(reader, changed, dtype))

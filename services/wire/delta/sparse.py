"""SX: the elements that changed, as gaps between them and signed differences of their bit patterns.

    gaps        u8, 255 means "255 more, and the gap goes on"; a gap counts the unchanged elements before a change
    signs       one bit per change, most significant first: 1 is negative
    big gaps    as gaps, over the changes: which differ by more than 1
    big sizes   |difference| - 2 of those, one stream per byte

Differences are taken modulo 2^bits, so that they add: consecutive deltas fold without the weights (`fold.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.runtime.errors import CorruptObjectError
from services.wire.delta import compiled
from services.wire.delta.compiled import ESCAPE
from services.wire.delta.streams import LENGTH, Bytes8, StreamReader, pack, pack_planes, read_planes
from services.wire.delta.tensors import Bits, Positions

SCAN_ELEMENTS = 128 << 10
"""Two blocks of bf16 and their flags stay in a core's own cache."""

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
    known = compiled.find_changes(base, new, offset)
    if known is not None:
        return Changes(count=base.size, positions=known[0], differences=known[1])
    room = min(SCAN_ELEMENTS, base.size)
    block, flags = np.empty(room, base.dtype), np.empty(room, np.bool_)
    positions: list[Positions] = []
    differences: list[Bits] = []
    for start in range(0, base.size, SCAN_ELEMENTS):
        size = min(SCAN_ELEMENTS, base.size - start)
        difference, flag = block[:size], flags[:size]
        np.subtract(new[start : start + size], base[start : start + size], out=difference)
        np.not_equal(difference, 0, out=flag)  # numpy finds the few that are true fast among booleans only
        found = flag.nonzero()[0]
        differences.append(difference[found])
        found += start + offset
        positions.append(found)
    if not positions:
        return Changes(count=0, positions=np.zeros(0, np.int64), differences=base[:0])
    return Changes(count=base.size, positions=np.concatenate(positions), differences=np.concatenate(differences))


def concatenated(pieces: Sequence[Changes], count: int) -> Changes:
    """One after another: changes of `count` elements, whose positions are counted from the first piece on."""
    if len(pieces) == 1:
        return pieces[0]
    positions = np.concatenate([piece.positions for piece in pieces])
    differences = np.concatenate([piece.differences for piece in pieces])
    return Changes(count=count, positions=positions, differences=differences)


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
    known = compiled.code_gaps(positions)
    if known is not None:
        return known
    gaps = np.empty(positions.size, np.int64)
    gaps[:1] = positions[:1]
    np.subtract(positions[1:], positions[:-1], out=gaps[1:])
    gaps[1:] -= 1
    long = np.flatnonzero(gaps >= ESCAPE)
    if long.size == 0:
        return gaps.astype(np.uint8)
    escapes, gaps[long] = np.divmod(gaps[long], ESCAPE)
    return np.insert(gaps.astype(np.uint8), np.repeat(long, escapes), np.uint8(ESCAPE))


def positions_of(coded: Bytes8, count: int) -> Positions:
    """The inverse of `gaps_of`. Raises CorruptObjectError where a position lies at or beyond `count`."""
    if coded.size and coded[-1] == ESCAPE:
        raise CorruptObjectError("a list of gaps ends inside a gap: fetch the object again")
    positions = np.cumsum(coded, dtype=np.int64)[np.flatnonzero(coded != ESCAPE)]
    positions += np.arange(positions.size)
    if positions.size and positions[-1] >= count:
        raise CorruptObjectError("a change lies outside its chunk: fetch the object again")
    return positions


def max_gap_bytes(count: int) -> int:
    """No valid list of gaps among `count` elements is longer."""
    return count + count // ESCAPE + 1


def pack_differences(differences: Bits) -> bytes:
    """Signs and sizes of differences that are never 0."""
    dtype = differences.dtype.type
    negative = differences.view(SIGNED[differences.dtype.itemsize]) < 0
    big = np.flatnonzero(((differences + dtype(1)) & ~dtype(2)) != 0)  # 1 and -1 become 2 and 0
    sizes = differences[big]
    sizes = np.where(negative[big], -sizes, sizes)
    signs = pack(np.packbits(negative), try_zstd=False)
    return signs + pack(gaps_of(big)) + pack_planes(sizes - dtype(2))


def read_differences(reader: StreamReader, count: int, dtype: "np.dtype[np.unsignedinteger]") -> Bits:
    """The inverse of `pack_differences` for `count` changes."""
    negative = np.unpackbits(reader.exact((count + 7) // 8), count=count).view(np.bool_)
    big = positions_of(reader.stream(max_gap_bytes(count)), count)
    # 1 becomes 1 and, where negative, 1 - 2 = -1
    differences = dtype.type(1) - (negative.view(np.uint8).astype(dtype) << dtype.type(1))
    sizes = read_planes(reader, big.size, dtype) + dtype.type(2)
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

"""Rice codes of many short rows of small numbers at once: the gaps between changes that fall evenly are geometric.

A row is a list of numbers with one parameter k. A number v is its quotient v >> k in unary and its k low bits:

    length     varint: bytes of the unary part
    unary      per number, rows one after another: so many 0 bits, then a 1
    low bits   per row: the lowest bit of all its numbers, then the next higher one, k in all
    rest       of the numbers whose quotient reached LIMIT, what it is more: planes of u32, only if there are any

Bits are filled from the highest of a byte on; those after the last are 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log, log1p, log2

import numpy as np

from services.runtime.errors import CorruptObjectError
from services.wire.delta.streams import Bytes8, StreamReader, pack_planes, read_planes, varint
from services.wire.delta.tensors import Positions

LIMIT = 20
"""Longest run of zeros: a number far beyond the others of its row costs 32 bits more, not thousands."""

MAX_PARAMETER = 31
ESCAPE_BITS = 32
SAMPLE = 4096
GOLDEN = log((5**0.5 - 1) / 2)
WIDE = np.dtype(np.uint32)

Numbers = np.ndarray[tuple[int], np.dtype[np.uint32]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """Numbers that share a parameter."""

    numbers: Numbers
    k: int

    def bits(self) -> int:
        """Exact size, but for the padding of the whole."""
        return bits_of(self.numbers, self.k)


def bits_of(numbers: Numbers, k: int) -> int:
    """Bits that a row takes."""
    if numbers.size == 0:
        return 0
    quotients = numbers >> WIDE.type(k)
    escaped = int(np.count_nonzero(quotients >= LIMIT))
    if escaped:
        quotients = np.minimum(quotients, LIMIT)
    return int(quotients.sum(dtype=np.int64)) + numbers.size * (k + 1) + ESCAPE_BITS * escaped


def parameter_of_gaps(marked: int, count: int) -> int:
    """The best k for the gaps between `marked` of `count` elements, drawn evenly (A. Kiely, 2004)."""
    if marked == 0 or 2 * marked >= count:
        return 0
    return max(0, 1 + floor(log2(GOLDEN / log1p(-marked / count))))


def best_parameter(numbers: Numbers) -> int:
    """The best k of any numbers: all are tried, on a sample where there are many."""
    if numbers.size == 0:
        return 0
    sample = numbers[:: 1 + numbers.size // SAMPLE]
    ks = np.arange(min(int(sample.max()).bit_length(), MAX_PARAMETER) + 1, dtype=WIDE)
    quotients = sample >> ks[:, None]
    escaped = np.count_nonzero(quotients >= LIMIT, axis=1)
    bits = np.minimum(quotients, LIMIT).sum(axis=1, dtype=np.int64) + ks * sample.size + ESCAPE_BITS * escaped
    return int(bits.argmin())


def gaps_between(positions: Positions) -> Numbers:
    """How many unmarked elements lie before each of these rising positions, since the one before it."""
    gaps = np.empty(positions.size, WIDE)
    gaps[:1] = positions[:1]
    np.subtract(positions[1:], positions[:-1], out=gaps[1:], casting="unsafe")
    gaps[1:] -= 1
    return gaps


def positions_between(gaps: Numbers, count: int) -> Positions:
    """The inverse of `gaps_between`. Raises CorruptObjectError where a position lies at or beyond `count`."""
    positions = np.cumsum(gaps, dtype=np.int64)
    positions += np.arange(positions.size)
    if positions.size and positions[-1] >= count:
        raise CorruptObjectError("a change lies outside its group: fetch the object again")
    return positions


def pack_rows(rows: Sequence[Row]) -> bytes:
    """All rows; how many numbers each has and its k are the reader's to know."""
    if not rows:
        return varint(0)
    quotients = np.concatenate([row.numbers >> WIDE.type(row.k) for row in rows])
    rest = quotients[quotients >= LIMIT] - WIDE.type(LIMIT)
    if rest.size:
        np.minimum(quotients, LIMIT, out=quotients)
    ends = np.cumsum(quotients, dtype=np.int64)
    ends += np.arange(ends.size)
    unary = np.zeros(int(ends[-1]) + 1 if ends.size else 0, np.bool_)
    unary[ends] = True
    low = np.empty(sum(row.k * row.numbers.size for row in rows), np.bool_)
    offset = 0
    for row in rows:
        for bit in range(row.k):
            plane = low[offset : offset + row.numbers.size]
            np.not_equal(row.numbers & WIDE.type(1 << bit), 0, out=plane)
            offset += plane.size
    coded = np.packbits(unary).tobytes()
    planes = pack_planes(rest) if rest.size else b""
    return varint(len(coded)) + coded + np.packbits(low).tobytes() + planes


def read_rows(reader: StreamReader, shapes: Sequence[tuple[int, int]], max_bits: int) -> list[Numbers]:
    """The rows of (length, k) as pack_rows wrote them. Raises CorruptObjectError.

    Nothing is allocated for more than `max_bits` bits of either part, nor for more than the payload has.
    """
    total = sum(length for length, _ in shapes)
    low_bits = sum(length * k for length, k in shapes)
    unary_bytes = reader.varint()
    if max(8 * (unary_bytes - 1), low_bits) > max_bits or total > 8 * unary_bytes:
        raise CorruptObjectError("a chunk claims more bits than its elements can need: fetch the object again")
    quotients = _read_unary(np.frombuffer(reader.take(unary_bytes), np.uint8), total)
    low = np.frombuffer(reader.take((low_bits + 7) // 8), np.uint8)
    if low_bits % 8 and low[-1] & (0xFF >> low_bits % 8):
        raise CorruptObjectError("a chunk has bits after its last number: fetch the object again")
    escaped = np.flatnonzero(quotients == LIMIT)
    if escaped.size:
        rest = read_planes(reader, escaped.size, WIDE)
        if int(rest.max()) > np.iinfo(np.uint32).max - LIMIT:
            raise CorruptObjectError("a chunk holds a number that is too large: fetch the object again")
        quotients[escaped] += rest
    rows: list[Numbers] = []
    start = bit_start = 0
    for length, k in shapes:
        row = quotients[start : start + length]
        if length and k:
            if int(row.max()) >> (32 - k):
                raise CorruptObjectError("a chunk holds a number that is too large: fetch the object again")
            row = (row << WIDE.type(k)) | _read_low(low, bit_start, length, k)
        rows.append(row)
        start += length
        bit_start += length * k
    return rows


def _read_unary(coded: Bytes8, total: int) -> Numbers:
    """`total` quotients, none above LIMIT, from bits that end with the last of them."""
    ends = np.flatnonzero(np.unpackbits(coded).view(np.bool_))
    if ends.size != total or (coded.size and not coded[-1]):
        raise CorruptObjectError("a chunk has another number of gaps than it claims: fetch the object again")
    quotients = np.empty(total, WIDE)
    quotients[:1] = ends[:1]
    np.subtract(ends[1:], ends[:-1], out=quotients[1:], casting="unsafe")
    quotients[1:] -= 1
    if total and int(quotients.max()) > LIMIT:
        raise CorruptObjectError("a chunk has too long a run of zeros: fetch the object again")
    return quotients


def _read_low(low: Bytes8, bit_start: int, length: int, k: int) -> Numbers:
    """k planes of `length` bits each, from bit `bit_start` on."""
    first = bit_start // 8
    window = low[first : (bit_start + length * k + 7) // 8]
    planes = np.unpackbits(window)[bit_start - 8 * first :][: length * k].reshape(k, length)
    numbers = planes[0].astype(WIDE)
    for bit in range(1, k):
        numbers |= planes[bit].astype(WIDE) << WIDE.type(bit)
    return numbers

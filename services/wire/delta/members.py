"""Elements sorted by exponent, without sorting them: bit masks that tell the rank of an element in its group and back.

64 elements are one word, the first in the lowest bit; 8 words are a block. Nothing but its bits is written per element.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from services.wire.delta.tensors import Positions

Exponents = np.ndarray[tuple[int], np.dtype[np.uint8]]
Words = np.ndarray[tuple[int], np.dtype[np.uint64]]
Rows = np.ndarray[tuple[int, int], np.dtype[np.uint64]]

BLOCK = 512
EXPONENTS = 256
SCAN_ELEMENTS = 128 << 10
"""Elements per pass: their bytes and flags stay in a core's own cache."""

FEW = 1 / 100
"""A limit that at most this share of the elements lie below: the smaller limits are looked for among those few only."""
SAMPLE_STRIDE = 127
DENSE = 1 / 32
"""From this share of all elements on, positions are looked up in a list of all instead of found one by one."""

RANKED_AT_ONCE = 32 << 10
"""Elements per pass of `ranks` and `positions`: the numbers about them stay in the cache too."""

_WORD = np.uint64
_BYTES = _WORD(0x0101_0101_0101_0101)
_BYTES_TOP = _WORD(0x8080_8080_8080_8080)
_PAIRS = _WORD(0x0001_0001_0001_0001)
_PAIRS_LOW = _WORD(0x00FF_00FF_00FF_00FF)
_PAIRS_TOP = _WORD(0x8000_8000_8000_8000)


def _places_in_bytes() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """At 8 * byte + r, the place of the r-th 1 bit of `byte`."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8).reshape(-1, 1), axis=1, bitorder="little")
    ranks = np.cumsum(bits, axis=1, dtype=np.uint8) - bits
    places = np.zeros((256, 8), np.uint8)
    byte, place = np.nonzero(bits)
    places[byte, ranks[byte, place]] = place
    return places.reshape(-1)


_PLACES = _places_in_bytes()


class ExponentRow(Protocol):
    """Exponents of a row of elements."""

    @property
    def size(self) -> int: ...

    def sampled(self) -> Exponents:
        """Of every SAMPLE_STRIDE-th element."""
        ...

    def at(self, positions: Positions) -> Exponents:
        """At rising positions."""
        ...

    def read(self, first: int, out: Exponents) -> None:
        """Those from `first` on into all of `out`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Listed:
    """Exponents as they are."""

    exponents: Exponents

    @property
    def size(self) -> int:
        return self.exponents.size

    def sampled(self) -> Exponents:
        return self.exponents[::SAMPLE_STRIDE]

    def at(self, positions: Positions) -> Exponents:
        return self.exponents[positions]

    def read(self, first: int, out: Exponents) -> None:
        out[:] = self.exponents[first : first + out.size]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Elements by group; a group's elements keep their order. All arrays are rows of the groups, one after another."""

    words: Words
    """Which elements are in the group; a multiple of 8 for each."""

    counts: Words
    """How many 1 bits each word has, one byte per word: 8 words' counts are one number."""

    reached: np.ndarray[tuple[int], np.dtype[np.int32]]
    """How many 1 bits there are up to the end of each block."""

    few: "Groups | None"
    """The first groups, among the elements of row 0, which has those of them all."""

    elements: Positions
    """The elements of row 0, if `few`."""

    starts: list[int]
    """How many 1 bits are before each row, and in all."""

    @property
    def sizes(self) -> list[int]:
        """How many elements each group has."""
        sizes = [stop - start for start, stop in pairwise(self.starts)]
        return sizes if self.few is None else [*self.few.sizes, *sizes[1:]]

    def ranks(self, positions: Positions, edges: Sequence[int]) -> Positions:
        """How many elements of its group lie before each element; edges[g] is where those of group g begin."""
        outer, few = self._edges(edges)
        row_of = np.repeat(np.arange(len(self.starts) - 1), np.diff(outer))
        ranks = np.empty(positions.size, np.int64)
        for start in range(0, positions.size, RANKED_AT_ONCE):
            some = slice(start, start + RANKED_AT_ONCE)
            ranks[some] = self._ranks(positions[some], row_of[some])
        if self.few is not None:
            ranks[: few[-1]] = self.few.ranks(ranks[: few[-1]], few)
        return ranks

    def _ranks(self, positions: Positions, row_of: Positions) -> Positions:
        place = positions.astype(_WORD)
        blocks = (positions >> 9) + row_of * (self.counts.size // (len(self.starts) - 1))
        counts = self.counts[blocks]
        earlier = counts & _lowest((place >> _WORD(6) & _WORD(7)) << _WORD(3))
        ranks = self.reached[blocks] - (_sum_of_bytes(counts) - _sum_of_bytes(earlier)).astype(np.int64)
        ranks -= np.asarray(self.starts)[row_of]
        words = self.words[(blocks << 3) + (positions >> 6 & 7)]
        return ranks + np.bitwise_count(words & _lowest(place & _WORD(63)))

    def positions(self, ranks: Positions, edges: Sequence[int]) -> Positions:
        """The inverse of `ranks`; those of a group rise."""
        outer, few = self._edges(edges)
        first = few[-1] if self.few is not None else 0
        positions = np.empty(ranks.size, np.int64)
        if self.few is not None:
            positions[:first] = self.elements[self.few.positions(ranks[:first], few)]
        outer = [max(edge, first) for edge in outer]
        if ranks.size > DENSE * self.starts[-1]:
            for row, (start, stop) in enumerate(pairwise(outer)):
                positions[start:stop] = _members(self._row(row))[ranks[start:stop]] if stop > start else 0
        else:
            row_of = np.repeat(np.arange(len(outer) - 1), np.diff(outer))
            positions[first:] = self._select(ranks[first:] + np.asarray(self.starts)[row_of])
            positions[first:] -= row_of * (self.words.size // (len(outer) - 1) * 64)
        return positions

    def _edges(self, edges: Sequence[int]) -> tuple[list[int], list[int]]:
        """For our rows, and for the groups of `few`."""
        inside = 0 if self.few is None else len(self.few.sizes)
        return [0, *edges[max(inside, 1) :]], list(edges[: inside + 1])

    def _row(self, row: int) -> Words:
        size = self.words.size // (len(self.starts) - 1)
        return self.words[row * size : (row + 1) * size]

    def _select(self, ranks: Positions) -> Positions:
        """The place of the 1 bit of each rank among all rows; the ranks rise."""
        blocks = np.searchsorted(self.reached, ranks.astype(np.int32), side="right")
        counts = self.counts[blocks]
        rest = (ranks - self.reached[blocks]).astype(_WORD) + _sum_of_bytes(counts)
        # The counts of a block's words in pairs of bytes, four and four: which half, then which word.
        halves = counts & _WORD(0xFFFF_FFFF), counts >> _WORD(32)
        in_first = _sum_of_bytes(halves[0])
        second = rest >= in_first
        rest -= in_first * second
        four = np.where(second, halves[1], halves[0])
        four = (four | four << _WORD(16)) & _WORD(0x0000_FFFF_0000_FFFF)
        reached = ((four | four << _WORD(8)) & _PAIRS_LOW) * _PAIRS
        passed = np.bitwise_count(((rest * _PAIRS | _PAIRS_TOP) - reached) & _PAIRS_TOP).astype(_WORD)
        rest -= (reached << _WORD(16)) >> (passed << _WORD(4)) & _WORD(0xFFFF)
        index = (blocks << 3) + (second.astype(np.int64) << 2) + passed.astype(np.int64)
        return (index << 6) + _select_in_words(self.words[index], rest)


def groups_between(source: ExponentRow, limits: Sequence[int]) -> Groups:
    """Groups: exponents below the first limit, from each limit to below the next, and from the last on.

    `limits` rise, and are above 0.
    """
    sample = np.bincount(source.sampled(), minlength=EXPONENTS).cumsum()
    few = max((i for i, limit in enumerate(limits) if sample[limit - 1] <= FEW * sample[-1]), default=0)
    rows = _rows(len(limits) - few + 1, -(-source.size // BLOCK) * (BLOCK // 64))
    _mark(source, limits[few:], rows)
    words = rows.reshape(-1)
    counts = np.bitwise_count(words).view(_WORD)
    reached = np.cumsum(_sum_of_bytes(counts), dtype=np.int32)
    ends = reached.reshape(len(rows), -1)[:, -1].tolist() if rows.size else [0] * len(rows)
    elements = _members(rows[0]) if few else np.zeros(0, np.int64)
    inner = groups_between(Listed(exponents=source.at(elements)), limits[:few]) if few else None
    return Groups(words=words, counts=counts, reached=reached, few=inner, elements=elements, starts=[0, *ends])


def _rows(number: int, words: int) -> Rows:
    """Rows of words; only the end of each, behind all elements, is set."""
    rows = np.empty((number, words), _WORD)
    rows[:, -(BLOCK // 64) :] = 0
    return rows


def _mark(source: ExponentRow, limits: Sequence[int], rows: Rows) -> None:
    """Sets the bit of each element in its group's row, block by block."""
    coded = rows.view(np.uint8)
    room = min(SCAN_ELEMENTS, source.size)
    exponents, flags = np.empty(room, np.uint8), np.empty(room, np.bool_)
    for start in range(0, source.size, SCAN_ELEMENTS):
        count = min(SCAN_ELEMENTS, source.size - start)
        block, flag = exponents[:count], flags[:count]
        source.read(start, block)
        first, last = start // 8, start // 8 + -(-count // 8)
        below: Exponents | None = None
        for row, limit in zip(coded, limits, strict=False):
            bits = np.packbits(np.less(block, np.uint8(limit), out=flag), bitorder="little")
            row[first:last] = bits if below is None else bits ^ below
            below = bits
        everything = np.packbits(np.ones(count, np.bool_), bitorder="little")
        coded[-1, first:last] = everything if below is None else everything ^ below


def _members(words: Words) -> Positions:
    """The places of all 1 bits: where they are few, by way of the bytes that have any."""
    if int(np.bitwise_count(words).sum(dtype=np.int64)) > DENSE * 64 * words.size:
        return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_))
    some = np.flatnonzero(words != 0)
    data = words[some].view(np.uint8)
    where = np.flatnonzero(data != 0)
    data = data[where]
    places = (some[where >> 3] << 6) + ((where & 7) << 3)
    counts = np.bitwise_count(data)
    ends = np.cumsum(counts, dtype=np.int64)
    found = np.empty(int(ends[-1]) if ends.size else 0, np.int64)
    ends -= counts
    index = data.astype(np.int64) << 3
    rank = 0
    while ends.size:
        found[ends + rank] = places + _PLACES[index + rank]
        rank += 1
        more = np.flatnonzero(counts > rank)
        ends, places, index, counts = ends[more], places[more], index[more], counts[more]
    return found


def _lowest(bits: Words) -> Words:
    """Words whose lowest so many bits are 1, for 0 to 63."""
    return (_WORD(1) << bits) - _WORD(1)


def _sum_of_bytes(numbers: Words) -> Words:
    """Of the 8 bytes of each, at most 64 in each."""
    pairs = (numbers & _PAIRS_LOW) + (numbers >> _WORD(8) & _PAIRS_LOW)
    return pairs * _PAIRS >> _WORD(48)


def _select_in_words(words: Words, ranks: Words) -> Positions:
    """The place in each word of its 1 bit of the given rank."""
    # Per byte, how many bits are 1 up to its end; then how many of these counts do not exceed the rank.
    reached = np.bitwise_count(words.view(np.uint8)).view(_WORD) * _BYTES
    passed = np.bitwise_count(((ranks * _BYTES | _BYTES_TOP) - reached) & _BYTES_TOP).astype(_WORD) << _WORD(3)
    rest = ranks - ((reached << _WORD(8)) >> passed & _WORD(0xFF))
    byte = words >> passed & _WORD(0xFF)
    return passed.astype(np.int64) + _PLACES[(byte << _WORD(3) | rest).astype(np.int64)]

"""Sets of elements as bit masks: the rank of an element in its set, and the element of a rank.

The sets are ranges of exponents, and cover all elements. 64 elements are one word, the first in the lowest bit; 8 words
are a block. Finding them is work on bytes and words: nothing but its bits is written per element.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.wire.delta.sparse import Positions

Exponents = np.ndarray[tuple[int], np.dtype[np.uint8]]
Words = np.ndarray[tuple[int], np.dtype[np.uint64]]
Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]

BLOCK = 512
SCAN_ELEMENTS = 128 << 10
"""The bytes and flags of so many elements stay in a core's own cache."""

FEW = 1 / 16
"""Where so few elements lie below a limit, and MANY_LIMITS are lower still, these are looked for among the few only."""
MANY_LIMITS = 4

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Members:
    """One set of elements."""

    words: Words
    """A multiple of 8."""

    counts: Words
    """How many members each word has, one byte per word: 8 words' counts are one number."""

    reached: np.ndarray[tuple[int], np.dtype[np.int32]]
    """How many members there are up to the end of each block."""

    @staticmethod
    def of(words: Words) -> "Members":
        counts = np.bitwise_count(words).view(_WORD)
        return Members(words=words, counts=counts, reached=np.cumsum(_sum_of_bytes(counts), dtype=np.int32))

    @property
    def count(self) -> int:
        return int(self.reached[-1]) if self.reached.size else 0

    def ranks(self, positions: Positions) -> Positions:
        """How many members lie before each of these members."""
        place = positions.astype(_WORD)
        blocks = positions >> 9
        counts = self.counts[blocks]
        ranks = self.reached[blocks] - _sum_of_bytes(counts).astype(np.int64)
        earlier = counts & _lowest((place >> _WORD(6) & _WORD(7)) << _WORD(3))
        ranks += _sum_of_bytes(earlier).astype(np.int64)
        ranks += np.bitwise_count(self.words[positions >> 6] & _lowest(place & _WORD(63)))
        return ranks

    def positions(self, ranks: Positions) -> Positions:
        """The inverse of `ranks`, for rising ranks below `count`."""
        if ranks.size > self.words.size:
            return np.flatnonzero(np.unpackbits(self.words.view(np.uint8), bitorder="little").view(np.bool_))[ranks]
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
        return (index << 6) + _select(self.words[index], rest)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nested:
    """A set among the members of another."""

    outer: Members
    elements: Positions
    """The members of `outer`."""

    inner: "Members | Nested"

    @property
    def count(self) -> int:
        return self.inner.count

    def ranks(self, positions: Positions) -> Positions:
        return self.inner.ranks(self.outer.ranks(positions))

    def positions(self, ranks: Positions) -> Positions:
        return self.elements[self.inner.positions(ranks)]


def sets_between(exponents: Exponents, limits: Sequence[int]) -> list[Members | Nested]:
    """The elements with an exponent below the first limit, from each limit to below the next, and from the last on.

    `limits` rise, and are above 0.
    """
    sets: list[Members | Nested] = []
    above: Words = _first(exponents.size)
    for number in range(len(limits) - 1, -1, -1):
        below = _below(exponents, limits[number])
        sets.append(Members.of(np.bitwise_xor(above, below, out=above)))
        above = below
        if number >= MANY_LIMITS:
            outer = Members.of(below)
            if outer.count <= FEW * exponents.size:
                elements = _elements(below)
                inner = sets_between(exponents[elements], limits[:number])
                nested = [Nested(outer=outer, elements=elements, inner=one) for one in inner]
                return [*nested, *reversed(sets)]
    sets.append(Members.of(above))
    return sets[::-1]


def _below(exponents: Exponents, limit: int) -> Words:
    """Which are below the limit."""
    words = np.zeros(_words_for(exponents.size), _WORD)
    coded = words.view(np.uint8)
    flags = np.empty(min(SCAN_ELEMENTS, exponents.size), np.bool_)
    for start in range(0, exponents.size, SCAN_ELEMENTS):
        block = exponents[start : start + SCAN_ELEMENTS]
        bits = np.packbits(np.less(block, np.uint8(limit), out=flags[: block.size]), bitorder="little")
        coded[start // 8 : start // 8 + bits.size] = bits
    return words


def _elements(words: Words) -> Positions:
    """The places of all 1 bits."""
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_))


def _first(count: int) -> Words:
    """The first `count` bits are 1."""
    words = np.zeros(_words_for(count), _WORD)
    words[: count // 64] = ~_WORD(0)
    if count % 64:
        words[count // 64] = (1 << count % 64) - 1
    return words


def _words_for(count: int) -> int:
    return -(-count // BLOCK) * (BLOCK // 64)


def _lowest(bits: Words) -> Words:
    """Words whose lowest so many bits are 1, for 0 to 63."""
    return (_WORD(1) << bits) - _WORD(1)


def _sum_of_bytes(numbers: Words) -> Words:
    """Of the 8 bytes of each, at most 64 in each."""
    pairs = (numbers & _PAIRS_LOW) + (numbers >> _WORD(8) & _PAIRS_LOW)
    return pairs * _PAIRS >> _WORD(48)


def _select(words: Words, ranks: Words) -> Positions:
    """The place in each word of its 1 bit of the given rank."""
    # Per byte, how many bits are 1 up to its end; then how many of these counts do not exceed the rank.
    reached = np.bitwise_count(words.view(np.uint8)).view(_WORD) * _BYTES
    passed = np.bitwise_count(((ranks * _BYTES | _BYTES_TOP) - reached) & _BYTES_TOP).astype(_WORD) << _WORD(3)
    rest = ranks - ((reached << _WORD(8)) >> passed & _WORD(0xFF))
    byte = words >> passed & _WORD(0xFF)
    return passed.astype(np.int64) + _PLACES[(byte << _WORD(3) | rest).astype(np.int64)]

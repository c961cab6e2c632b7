"""The exponents of base weights, and the elements sorted by them: what XC knows at both ends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np

from services.wire.delta.members import EXPONENTS, SAMPLE_STRIDE, Exponents, groups_between
from services.wire.delta.sparse import Changes
from services.wire.delta.tensors import Bits, Positions

EXPONENT_SHIFT = {"BF16": 7, "F16": 10, "F32": 23}
"""Where the exponent starts, in the types that XC is for; exponents have at most 8 bits."""

F16_MASK = np.uint8(0x1F)


class ExponentSource(Protocol):
    """What the encoder asks of a base chunk, wherever the base lies."""

    def sampled(self) -> Exponents:
        """Exponents of every SAMPLE_STRIDE-th element."""
        ...

    def at(self, positions: Positions) -> Exponents:
        """Exponents at rising positions."""
        ...

    def ranked(self, limits: Sequence[int], changes: Changes, changed_exponents: Exponents) -> list[Changes]:
        """The changes of each group and then of the rest, by rank among the group's elements."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostExponents:
    """Of a base chunk in this process's memory, given in pieces."""

    pieces: Sequence[Bits]
    shift: int

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def sampled(self) -> Exponents:
        found = [self._exponents_of(piece[-start % SAMPLE_STRIDE :: SAMPLE_STRIDE]) for start, piece in self._placed()]
        return np.concatenate(found) if found else np.zeros(0, np.uint8)

    def at(self, positions: Positions) -> Exponents:
        found = np.empty(positions.size, np.uint8)
        for start, piece in self._placed():
            first, last = np.searchsorted(positions, (start, start + piece.size))
            found[first:last] = self._exponents_of(piece[positions[first:last] - start])
        return found

    def read(self, first: int, out: Exponents) -> None:
        """Those from `first` on into all of `out`."""
        for start, piece in self._placed():
            begin, end = max(first - start, 0), min(first + out.size - start, piece.size)
            if begin < end:
                shifted = piece[begin:end] >> piece.dtype.type(self.shift)
                # The lowest byte: what is left above an exponent of 8 bits is the sign.
                np.copyto(out[start + begin - first : start + end - first], shifted, casting="unsafe")
        if self.shift == EXPONENT_SHIFT["F16"]:
            np.bitwise_and(out, F16_MASK, out=out)

    def ranked(self, limits: Sequence[int], changes: Changes, changed_exponents: Exponents) -> list[Changes]:
        number_of = np.searchsorted(limits, np.arange(EXPONENTS), side="right").astype(np.uint8)
        numbers = number_of[changed_exponents]
        order = np.argsort(numbers, kind="stable")
        edges = np.searchsorted(numbers[order], np.arange(len(limits) + 2)).tolist()
        groups = groups_between(self, limits)
        ranks, differences = groups.ranks(changes.positions[order], edges), changes.differences[order]
        return [
            Changes(count=size, positions=ranks[first:last], differences=differences[first:last])
            for size, first, last in zip(groups.sizes, edges[:-1], edges[1:], strict=True)
        ]

    def _placed(self) -> Iterator[tuple[int, Bits]]:
        return zip(accumulate((piece.size for piece in self.pieces), initial=0), self.pieces, strict=False)

    def _exponents_of(self, bits: Bits) -> Exponents:
        exponents = (bits >> bits.dtype.type(self.shift)).astype(np.uint8)
        return exponents & F16_MASK if self.shift == EXPONENT_SHIFT["F16"] else exponents

"""The exponents of base weights, and the elements sorted by them: what XC knows at both ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.wire.delta.members import Exponents, sets_between
from services.wire.delta.sparse import SCAN_ELEMENTS, Changes, Positions
from services.wire.delta.tensors import Bits

EXPONENT_SHIFT = {"BF16": 7, "F16": 10, "F32": 23}
"""Where the exponent starts, in the types that XC is for; exponents have at most 8 bits."""

F16_MASK = np.uint8(0x1F)
EXPONENTS = 256
SAMPLE_STRIDE = 31


class ExponentSource(Protocol):
    """What the encoder asks of a base chunk, wherever the base lies."""

    def sampled(self) -> Exponents:
        """Exponents of every SAMPLE_STRIDE-th element."""
        ...

    def at(self, positions: Positions) -> Exponents: ...

    def ranked(self, limits: Sequence[int], changes: Changes, changed_exponents: Exponents) -> list[Changes]:
        """The changes of each group and then of the rest, by rank among the group's elements."""
        ...


def exponents_of(pieces: Sequence[Bits], shift: int) -> Exponents:
    """The exponent fields, biased, of all pieces one after another."""
    fields = np.empty(sum(piece.size for piece in pieces), np.uint8)
    offset = 0
    for piece in pieces:
        shifted = np.empty(min(SCAN_ELEMENTS, piece.size), piece.dtype)
        for start in range(0, piece.size, SCAN_ELEMENTS):
            block = piece[start : start + SCAN_ELEMENTS]
            np.right_shift(block, piece.dtype.type(shift), out=shifted[: block.size])
            # The lowest byte: what is left above an exponent of 8 bits is the sign.
            np.copyto(fields[offset : offset + block.size], shifted[: block.size], casting="unsafe")
            offset += block.size
    if shift == EXPONENT_SHIFT["F16"]:
        np.bitwise_and(fields, F16_MASK, out=fields)
    return fields


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostExponents:
    """Of a base chunk in this process's memory."""

    fields: Exponents
    """One per element."""

    @staticmethod
    def of(pieces: Sequence[Bits], shift: int) -> "HostExponents":
        return HostExponents(fields=exponents_of(pieces, shift))

    def sampled(self) -> Exponents:
        return self.fields[::SAMPLE_STRIDE]

    def at(self, positions: Positions) -> Exponents:
        return self.fields[positions]

    def ranked(self, limits: Sequence[int], changes: Changes, changed_exponents: Exponents) -> list[Changes]:
        groups: list[Changes] = []
        number_of = np.searchsorted(limits, np.arange(EXPONENTS), side="right").astype(np.uint8)
        numbers = number_of[changed_exponents]
        order = np.argsort(numbers, kind="stable")
        edges = np.searchsorted(numbers[order], np.arange(len(limits) + 2)).tolist()
        for members, first, last in zip(sets_between(self.fields, limits), edges[:-1], edges[1:], strict=True):
            mine = order[first:last]
            ranks = members.ranks(changes.positions[mine])
            groups.append(Changes(count=members.count, positions=ranks, differences=changes.differences[mine]))
        return groups

"""XC: which elements change is told by the exponent of the base weight, which both ends already hold.

A small weight has a small rounding step, so a step of the optimizer changes it more often. The elements whose exponent
lies below a limit are "hot". They are sorted into groups of neighbouring exponents, in element order within a group,
and each group is coded by itself, so that zstd sees bytes of one distribution. The cold rest is coded as one group.

    u8           number of hot groups, 0 to 64
    u8 each      first exponent above the group, rising; the last is the limit
    per group    u8 encoding (SX or SPLIT), then its payload over the group's elements
    rest         u8 encoding, then its payload over the cold elements
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.runtime.errors import CorruptObjectError
from services.wire.delta.density import as_changes, encode_changes, read_encoded
from services.wire.delta.sparse import SCAN_ELEMENTS, Changes, Positions
from services.wire.delta.streams import StreamReader
from services.wire.delta.tensors import Bits

EXPONENT_SHIFT = {"BF16": 7, "F16": 10, "F32": 23}
"""Where the exponent starts, in the types that XC is for; exponents have at most 8 bits."""

MAX_GROUPS = 64
EXPONENTS = 256
SAMPLE_STRIDE = 31
GROUP_COST_BITS = 600.0
HOT_COST_BITS = 0.01
"""What a group adds in headers and Huffman tables; and the price of time: sorting an element is worth so many bits."""

Exponents = np.ndarray[tuple[int], np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grouping:
    """The hot elements' positions, rising; and per group those positions again, in element order."""

    hot: Positions
    groups: list[Positions]


def exponents_of(base: Bits, shift: int) -> Exponents:
    """The exponent fields, biased."""
    return ((base >> base.dtype.type(shift)) & base.dtype.type(0xFF if shift != 10 else 0x1F)).astype(np.uint8)


def group_elements(base: Bits, shift: int, limits: Sequence[int]) -> Grouping:
    """Finds the hot elements and their groups. Needs only the base: encoder and decoder find the same."""
    if not limits:
        return Grouping(hot=np.zeros(0, np.int64), groups=[])
    dtype = base.dtype.type
    threshold = dtype(min(limits[-1] << (shift + 1), np.iinfo(base.dtype).max))
    table = np.searchsorted(np.asarray(limits), np.arange(EXPONENTS), side="right").astype(np.uint8)
    magnitudes = np.empty(min(SCAN_ELEMENTS, base.size), base.dtype)
    flags = np.empty(magnitudes.size, np.bool_)
    positions: list[Positions] = []
    group_of: list[Exponents] = []
    for start in range(0, base.size, SCAN_ELEMENTS):
        size = min(SCAN_ELEMENTS, base.size - start)
        block, flag = magnitudes[:size], flags[:size]
        np.left_shift(base[start : start + size], dtype(1), out=block)
        np.less(block, threshold, out=flag)
        found = np.flatnonzero(flag)
        group_of.append(table[block[found] >> dtype(shift + 1)])
        found += start
        positions.append(found)
    hot, groups = np.concatenate(positions), np.concatenate(group_of)
    return Grouping(hot=hot, groups=[hot[groups == number] for number in range(len(limits))])


class ExponentSource(Protocol):
    """What the encoder asks of a base chunk, wherever the base lies."""

    def sampled(self) -> Exponents:
        """Exponents of every SAMPLE_STRIDE-th element."""
        ...

    def at(self, positions: Positions) -> Exponents: ...

    def ranked(self, limits: Sequence[int], changes: Changes, changed_exponents: Exponents) -> list[Changes]:
        """The changes of each group and then of the rest, by rank among the group's elements."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostExponents:
    """Of a base chunk in this process's memory."""

    base: Bits
    shift: int

    def sampled(self) -> Exponents:
        return exponents_of(self.base[::SAMPLE_STRIDE], self.shift)

    def at(self, positions: Positions) -> Exponents:
        return exponents_of(self.base[positions], self.shift)

    def ranked(self, limits: Sequence[int], changes: Changes, changed_exponents: Exponents) -> list[Changes]:
        grouping = group_elements(self.base, self.shift, limits)
        groups: list[Changes] = []
        for members, low, high in zip(grouping.groups, [0, *limits], limits, strict=False):
            mine = (changed_exponents >= low) & (changed_exponents < high)
            ranks = np.searchsorted(members, changes.positions[mine])
            groups.append(Changes(count=members.size, positions=ranks, differences=changes.differences[mine]))
        cold = changed_exponents >= (limits[-1] if limits else 0)
        positions = changes.positions[cold]
        ranks = positions - np.searchsorted(grouping.hot, positions)
        count = self.base.size - grouping.hot.size
        return [*groups, Changes(count=count, positions=ranks, differences=changes.differences[cold])]


def pack_by_exponent(source: ExponentSource, changes: Changes) -> bytes:
    """The XC payload."""
    changed_exponents = source.at(changes.positions)
    limits = choose_limits(source.sampled(), changed_exponents, changes.count)
    groups = source.ranked(limits, changes, changed_exponents)
    return bytes((len(limits), *limits)) + b"".join(encode_changes(group) for group in groups)


def read_by_exponent(reader: StreamReader, base: Bits, dtype: str) -> Changes:
    """The changes that an XC payload makes to `base`. Raises CorruptObjectError."""
    shift = EXPONENT_SHIFT.get(dtype)
    number = reader.take(1)[0]
    limits = list(reader.take(number))
    if (
        shift is None
        or number > MAX_GROUPS
        or any(low >= high for low, high in zip([0, *limits], limits, strict=False))
    ):
        raise CorruptObjectError("a chunk sorts its elements in an impossible way: fetch the object again")
    grouping = group_elements(base, shift, limits)
    positions: list[Positions] = []
    differences: list[Bits] = []
    for members in grouping.groups:
        changes = as_changes(read_encoded(reader.take(1)[0], reader, members.size, base.dtype))
        positions.append(members[changes.positions])
        differences.append(changes.differences)
    count = base.size - grouping.hot.size
    rest = as_changes(read_encoded(reader.take(1)[0], reader, count, base.dtype))
    before = np.searchsorted(grouping.hot - np.arange(grouping.hot.size), rest.positions, side="right")
    positions.append(rest.positions + before)
    differences.append(rest.differences)
    found = np.concatenate(positions)
    order = np.argsort(found, kind="stable")
    return Changes(count=base.size, positions=found[order], differences=np.concatenate(differences)[order])


def choose_limits(sampled: Exponents, changed_exponents: Exponents, count: int) -> list[int]:
    """Group limits by estimated size: from how often each exponent occurs (a sample) and how often it changed."""
    present = np.bincount(sampled, minlength=EXPONENTS) * float(SAMPLE_STRIDE)
    changed = np.bincount(changed_exponents, minlength=EXPONENTS).astype(np.float64)
    present = np.maximum(present, changed)
    best: list[int] = []
    best_cost = _bits(present.sum(), changed.sum())
    limits: list[int] = []
    hot_cost, group_present, group_changed = 0.0, 0.0, 0.0
    rest_present, rest_changed = present.sum(), changed.sum()
    for exponent in np.flatnonzero(present).tolist():
        apart = _bits(group_present, group_changed) + _bits(present[exponent], changed[exponent]) + GROUP_COST_BITS
        together = _bits(group_present + present[exponent], group_changed + changed[exponent])
        if apart < together and len(limits) < MAX_GROUPS - 1:
            limits.append(exponent)
            hot_cost += _bits(group_present, group_changed) + GROUP_COST_BITS
            group_present, group_changed = 0.0, 0.0
        group_present += present[exponent]
        group_changed += changed[exponent]
        rest_present -= present[exponent]
        rest_changed -= changed[exponent]
        cost = hot_cost + _bits(group_present, group_changed) + GROUP_COST_BITS + _bits(rest_present, rest_changed)
        cost += HOT_COST_BITS * (count - rest_present)
        if cost < best_cost and exponent + 1 < EXPONENTS:
            best_cost, best = cost, [*limits, exponent + 1]
    return best


def _bits(present: float, changed: float) -> float:
    """Entropy of which `changed` of `present` elements change, if every one is as likely."""
    if changed <= 0 or changed >= present:
        return 0.0
    share = changed / present
    return float(-present * (share * np.log2(share) + (1 - share) * np.log2(1 - share)))

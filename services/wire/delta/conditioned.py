"""XC: which elements change is told by the exponent of the base weight, which both ends already hold.

A small weight has a small rounding step, so a step of the optimizer changes it more often. The elements are sorted into
groups of neighbouring exponents, in element order within a group. There changes fall evenly, and the gaps between them
are Rice codes with a parameter of the group, and so are the few differences beyond 1.

    limits     u8 how many, at most 64; u8 each, rising: the first exponent above each group; the last group is the rest
    headers    per group: varint 0 for SPLIT, else changes + 1; if any: u8 k of their gaps, varint how many are beyond
               1; if any: u8 k of their gaps, u8 k of their sizes
    rows       of all groups the gaps between changes; then of all, between changes beyond 1; then their sizes - 2
    signs      one bit per change, most significant first: 1 is negative
    splits     the SPLIT contents, in order of the groups
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from services.runtime.errors import CorruptObjectError
from services.wire.delta.dense import changes_of_split, pack_split, read_split, split_of_changes
from services.wire.delta.density import SPLIT_FROM_DENSITY, Split
from services.wire.delta.exponents import EXPONENT_SHIFT, ExponentSource, HostExponents
from services.wire.delta.members import EXPONENTS, FEW, SAMPLE_STRIDE, Exponents, groups_between
from services.wire.delta.rice import (
    MAX_PARAMETER,
    Row,
    best_parameter,
    gaps_between,
    pack_rows,
    parameter_of_gaps,
    positions_between,
    read_rows,
)
from services.wire.delta.sparse import SIGNED, Changes
from services.wire.delta.streams import StreamReader, varint
from services.wire.delta.tensors import Bits, Positions

MAX_GROUPS = 64
SLACK_BITS = 4160
"""So many bits more than the elements themselves a chunk's rows may take: 64 for each group."""

SAMPLED_CHANGES = 128 << 10
GROUP_BITS = 40.0
LIMIT_BITS_PER_ELEMENT = 0.00007
"""What a group adds to the payload; and the price of time: looking at an element once more is worth so many bits."""

Places = np.ndarray[tuple[int], np.dtype[np.bool_]]
Costs = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """One group's changes as rows."""

    gaps: Row
    negative: Places
    big_gaps: Row
    sizes: Row

    def header(self) -> bytes:
        head = varint(self.negative.size + 1)
        if self.negative.size:
            head += bytes((self.gaps.k,)) + varint(self.sizes.numbers.size)
        if self.sizes.numbers.size:
            head += bytes((self.big_gaps.k, self.sizes.k))
        return head

    def bits(self) -> int:
        return self.gaps.bits() + self.negative.size + self.big_gaps.bits() + self.sizes.bits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a group's header says of its rows. `changed` is None for a group in SPLIT."""

    count: int
    changed: int | None
    k_gaps: int = 0
    big: int = 0
    k_big_gaps: int = 0
    k_sizes: int = 0


def pack_by_exponent(source: ExponentSource, changes: Changes) -> bytes:
    """The XC payload."""
    changed_exponents = source.at(changes.positions)
    limits = choose_limits(source.sampled(), changed_exponents, magnitudes(changes.differences), changes.count)
    headers: list[bytes] = []
    groups: list[Group] = []
    splits: list[bytes] = []
    for changed in source.ranked(limits, changes, changed_exponents):
        group = _group_of(changed)
        split = _cheaper_split(changed, group)
        if split is None:
            headers.append(group.header())
            groups.append(group)
        else:
            headers.append(varint(0))
            splits.append(split)
    rows = [group.gaps for group in groups] + [group.big_gaps for group in groups] + [group.sizes for group in groups]
    signs = np.packbits(np.concatenate([group.negative for group in groups])).tobytes() if groups else b""
    return b"".join((bytes((len(limits), *limits)), *headers, pack_rows(rows), signs, *splits))


def read_by_exponent(reader: StreamReader, base: Sequence[Bits], dtype: str) -> Changes | Split:
    """The changes that an XC payload makes to `base`, given in pieces. Raises CorruptObjectError."""
    shift = EXPONENT_SHIFT.get(dtype)
    number = reader.take(1)[0]
    limits = list(reader.take(number))
    if (
        shift is None
        or number > MAX_GROUPS
        or any(low >= high for low, high in zip([0, *limits], limits, strict=False))
    ):
        raise CorruptObjectError("a chunk sorts its elements in an impossible way: fetch the object again")
    exponents = HostExponents(pieces=base, shift=shift)
    groups, count = groups_between(exponents, limits), exponents.size
    decoded = _read_groups(reader, groups.sizes, base[0].dtype)
    edges = [0, *accumulate(changes.positions.size for changes in decoded)]
    positions = groups.positions(np.concatenate([changes.positions for changes in decoded]), edges)
    differences = np.concatenate([changes.differences for changes in decoded])
    if positions.size > count * SPLIT_FROM_DENSITY:
        return Split(differences=split_of_changes(Changes(count=count, positions=positions, differences=differences)))
    order = np.argsort(positions, kind="stable")
    return Changes(count=count, positions=positions[order], differences=differences[order])


def _read_groups(reader: StreamReader, counts: Sequence[int], dtype: "np.dtype[np.unsignedinteger]") -> list[Changes]:
    shapes = [_read_header(reader, count) for count in counts]
    gaps = [(_fewer(shape.changed, shape.count), shape.k_gaps) for shape in shapes if shape.changed is not None]
    big_gaps = [(_fewer(shape.big, shape.changed), shape.k_big_gaps) for shape in shapes if shape.changed is not None]
    sizes = [(shape.big, shape.k_sizes) for shape in shapes if shape.changed is not None]
    max_bits = 8 * dtype.itemsize * sum(counts) + SLACK_BITS
    rows = read_rows(reader, [*gaps, *big_gaps, *sizes], max_bits)
    changed = sum(shape.changed or 0 for shape in shapes)
    signs = np.frombuffer(reader.take((changed + 7) // 8), np.uint8)
    if changed % 8 and signs[-1] & (0xFF >> changed % 8):
        raise CorruptObjectError("a chunk has signs after its last change: fetch the object again")
    negative = np.unpackbits(signs, count=changed).view(np.bool_)
    decoded: list[Changes] = []
    number = first = 0
    for shape in shapes:
        if shape.changed is None:
            decoded.append(changes_of_split(read_split(reader, shape.count, dtype)))
            continue
        mine = rows[number], rows[len(gaps) + number], rows[2 * len(gaps) + number]
        positions = _marked(positions_between(mine[0], shape.count), shape.changed, shape.count)
        big = _marked(positions_between(mine[1], shape.changed), shape.big, shape.changed)
        differences = _differences(negative[first : first + shape.changed], big, mine[2], dtype)
        decoded.append(Changes(count=shape.count, positions=positions, differences=differences))
        number += 1
        first += shape.changed
    return decoded


def _read_header(reader: StreamReader, count: int) -> Shape:
    changed = reader.varint() - 1
    if changed < 0:
        return Shape(count=count, changed=None)
    if changed == 0:
        return Shape(count=count, changed=0)
    k_gaps, big = reader.take(1)[0], reader.varint()
    k_big_gaps, k_sizes = reader.take(2) if big else (0, 0)
    if changed > count or big > changed or max(k_gaps, k_big_gaps, k_sizes) > MAX_PARAMETER:
        raise CorruptObjectError("a chunk claims more changes than it has elements: fetch the object again")
    return Shape(count=count, changed=changed, k_gaps=k_gaps, big=big, k_big_gaps=k_big_gaps, k_sizes=k_sizes)


def magnitudes(differences: Bits) -> Bits:
    """Of the differences as signed numbers."""
    signed = differences.view(SIGNED[differences.dtype.itemsize])
    return np.abs(signed).view(differences.dtype)


def _group_of(changes: Changes) -> Group:
    sizes = magnitudes(changes.differences)
    big = np.flatnonzero(sizes != 1)
    beyond = sizes[big].astype(np.uint32) - np.uint32(2)
    return Group(
        gaps=_gaps(changes.positions, changes.count),
        negative=changes.differences.view(SIGNED[sizes.dtype.itemsize]) < 0,
        big_gaps=_gaps(big, sizes.size),
        sizes=Row(numbers=beyond, k=best_parameter(beyond)),
    )


def _gaps(marked: Positions, count: int) -> Row:
    """Between the marked of `count`; between the others where these are fewer."""
    coded = _marked(marked, count - marked.size, count) if 2 * marked.size > count else marked
    return Row(numbers=gaps_between(coded), k=parameter_of_gaps(coded.size, count))


def _marked(coded: Positions, marked: int, count: int) -> Positions:
    """`marked` of `count` are those at `coded`, or all others if that is how many these are."""
    if coded.size == marked:
        return coded
    others = np.ones(count, np.bool_)
    others[coded] = False
    return np.flatnonzero(others)


def _fewer(marked: int | None, count: int | None) -> int:
    """How many positions stand for `marked` of `count`."""
    return min(marked or 0, (count or 0) - (marked or 0))


def _differences(negative: Places, big: Positions, beyond: Bits, dtype: "np.dtype[np.unsignedinteger]") -> Bits:
    if beyond.size and int(beyond.max()) > 2 ** (8 * dtype.itemsize - 1) - 2:
        raise CorruptObjectError("a chunk has a difference that is too large for its type: fetch the object again")
    sizes = np.ones(negative.size, dtype)
    sizes[big] = beyond.astype(dtype) + dtype.type(2)
    return np.where(negative, -sizes, sizes)


def _cheaper_split(changes: Changes, group: Group) -> bytes | None:
    """SPLIT of a group, where its rows are larger, or more than a chunk may have: never where little changed."""
    if changes.positions.size < SPLIT_FROM_DENSITY * changes.count:
        return None
    bits = group.bits()
    split = pack_split(split_of_changes(changes))
    too_many = bits > 8 * changes.differences.dtype.itemsize * changes.count + SLACK_BITS // (MAX_GROUPS + 1)
    return split if too_many or 8 * len(split) < bits else None


def choose_limits(sampled: Exponents, changed_exponents: Exponents, sizes: Bits, count: int) -> list[int]:
    """Group limits of the smallest estimated size: from a sample of how often each exponent occurs, and what changed.

    `sizes` are the magnitudes of the differences, one for each of `changed_exponents`.
    """
    present = np.bincount(sampled, minlength=EXPONENTS) * float(SAMPLE_STRIDE)
    stride = 1 + changed_exponents.size // SAMPLED_CHANGES
    changed_exponents, sizes = changed_exponents[::stride], sizes[::stride]
    changed = np.bincount(changed_exponents, minlength=EXPONENTS)
    is_big = sizes != 1
    exponents_of_big, beyond = changed_exponents[is_big], np.minimum(sizes[is_big], 256) - 2.0
    big = np.bincount(exponents_of_big, minlength=EXPONENTS)
    total = np.bincount(exponents_of_big, weights=beyond, minlength=EXPONENTS)
    changed, big, total = (counts * stride for counts in (changed, big, total))
    present = np.maximum(present, changed)
    seen = np.flatnonzero(present)
    reached = [np.concatenate(([0.0], np.cumsum(counts[seen]))) for counts in (present, changed, big, total)]
    n, c, b, s = (np.maximum(ends[None, 1:] - ends[:-1, None], 0) for ends in reached)
    bits = _bits(n, c) + _bits(c, b) + b * (1.5 + np.log2(1 + s / np.maximum(b, 1)))
    below = reached[0][:-1] / max(reached[0][-1], 1)
    prices = np.where(below > FEW, LIMIT_BITS_PER_ELEMENT * count, 0.0)
    group_bits = GROUP_BITS
    while True:
        starts = _cheapest_cuts(bits + (prices + group_bits)[:, None])
        if len(starts) < MAX_GROUPS:
            return seen[starts].tolist()
        group_bits *= 2


def _cheapest_cuts(costs: "np.ndarray[tuple[int, int], np.dtype[np.float64]]") -> list[int]:
    """Where to begin new ranges, that 0 .. n - 1 be covered at the lowest cost; costs[i, j] is that of i to j."""
    best = np.zeros(len(costs) + 1)
    begun: list[int] = []
    for last in range(len(costs)):
        reached = best[: last + 1] + costs[: last + 1, last]
        begun.append(int(reached.argmin()))
        best[last + 1] = reached[begun[-1]]
    cuts: list[int] = []
    end = len(costs)
    while end and begun[end - 1]:
        end = begun[end - 1]
        cuts.append(end)
    return cuts[::-1]


def _bits(present: Costs, marked: Costs) -> Costs:
    """Entropy of which `marked` of `present` elements are meant, if every one is as likely."""
    share = np.clip(marked / np.maximum(present, 1), 1e-12, 1 - 1e-12)
    return np.where(marked > 0, -present * (share * np.log2(share) + (1 - share) * np.log2(1 - share)), 0.0)

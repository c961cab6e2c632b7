"""How the elements of a policy are cut into chunks (the unit of work) and parts (the unit of memory and transfer).

The cut depends on names, types and shapes only, so that consecutive updates of one policy have the same chunks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from services.wire.delta.tensors import Bits, TensorForm, Weights

CHUNK_ELEMENTS = 4 << 20
PART_BYTES = 64 << 20
MANY_PARTS = 8
"""A policy that would have fewer has parts of half the size: the sooner the first is made and the last one decoded, the
sooner the update is there."""
PART_SEGMENTS = 4096
"""More tensors than this in one part would make its table large."""
PART_EMPTY = 1024
"""Tensors without elements, beside these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Elements [start, start + count) of one tensor."""

    name: str
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """At most CHUNK_ELEMENTS elements of one dtype, in the order of the segments."""

    dtype: str
    segments: tuple[Segment, ...]

    @property
    def count(self) -> int:
        return sum(segment.count for segment in self.segments)

    @property
    def key(self) -> str:
        """The chunk's name in the container."""
        return f"{self.segments[0].name}@{self.segments[0].start}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLayout:
    """What one safetensors file of an update covers.

    `forms` has every tensor that a chunk here touches; the tensors without elements are in the first part, and where
    they are more than PART_EMPTY, so many in each.
    """

    forms: tuple[TensorForm, ...]
    chunks: tuple[Chunk, ...]


def plan_chunks(forms: Iterable[TensorForm]) -> list[Chunk]:
    """Chunks in name order within each dtype: large tensors are cut, small neighbours share one."""
    chunks: list[Chunk] = []
    for dtype, group in _by_dtype(forms).items():
        pending: list[Segment] = []
        room = CHUNK_ELEMENTS
        for form in group:
            for start in range(0, form.elements, CHUNK_ELEMENTS):
                count = min(CHUNK_ELEMENTS, form.elements - start)
                if count > room or len(pending) == PART_SEGMENTS:
                    chunks.append(Chunk(dtype=dtype, segments=tuple(pending)))
                    pending, room = [], CHUNK_ELEMENTS
                pending.append(Segment(name=form.name, start=start, count=count))
                room -= count
        if pending:
            chunks.append(Chunk(dtype=dtype, segments=tuple(pending)))
    return chunks


def plan_parts(forms: Sequence[TensorForm]) -> list[PartLayout]:
    """Parts of at most PART_BYTES of model bytes and PART_SEGMENTS segments; at least one."""
    by_name = {form.name: form for form in forms}
    full_bytes = sum(form.elements * form.item_bytes for form in forms)
    part_bytes = PART_BYTES if full_bytes >= MANY_PARTS * PART_BYTES else PART_BYTES // 2
    groups: list[list[Chunk]] = [[]]
    room, slots = part_bytes, PART_SEGMENTS
    for chunk in plan_chunks(forms):
        size = chunk.count * by_name[chunk.segments[0].name].item_bytes
        if size > room or len(chunk.segments) > slots:
            groups.append([])
            room, slots = part_bytes, PART_SEGMENTS
        groups[-1].append(chunk)
        room -= size
        slots -= len(chunk.segments)
    parts: list[PartLayout] = []
    empty = [form.name for form in forms if form.elements == 0]
    groups += [[] for _ in range(len(groups), -(-len(empty) // PART_EMPTY))]
    for index, chunks in enumerate(groups):
        names = {segment.name for chunk in chunks for segment in chunk.segments}
        names.update(empty[index * PART_EMPTY : (index + 1) * PART_EMPTY])
        parts.append(PartLayout(forms=tuple(by_name[name] for name in sorted(names)), chunks=tuple(chunks)))
    return parts


def views_of(weights: Weights, chunk: Chunk) -> list[Bits]:
    """The chunk's segments, not copied."""
    return [weights[part.name].bits[part.start : part.start + part.count] for part in chunk.segments]


def gather(weights: Weights, chunk: Chunk) -> Bits:
    """The chunk's elements in one array: a view where it has one segment."""
    views = views_of(weights, chunk)
    return views[0] if len(views) == 1 else np.concatenate(views)


def _by_dtype(forms: Iterable[TensorForm]) -> dict[str, list[TensorForm]]:
    groups: dict[str, list[TensorForm]] = {}
    for form in sorted(forms, key=lambda form: (form.dtype, form.name)):
        groups.setdefault(form.dtype, []).append(form)
    return groups

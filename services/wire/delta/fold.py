"""Squashing: consecutive deltas become one, in time and memory of what changed, without the weights.

Differences add modulo 2^bits, and those that come to zero fall out. Whole values replace what came before them. XC
needs its base to be read at all, so a store that squashes keeps SX deltas.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from services.runtime.errors import CorruptObjectError, InvalidWeightsError
from services.wire.delta.codec import Codec, Whole, decode_chunk, encode_values
from services.wire.delta.decode import Source, Survey, survey
from services.wire.delta.density import Encoding, Split, as_changes, as_differences, encode_changes
from services.wire.delta.encode import collect, part_info
from services.wire.delta.layout import Chunk
from services.wire.delta.part import Part, build_part, load_part, parse_part
from services.wire.delta.sparse import Changes
from services.wire.delta.update import EncodedUpdate, UpdateInfo, UpdateKind

Decoded = Whole | Split | Changes


def fold(updates: Sequence[Sequence[Source]]) -> EncodedUpdate:
    """One delta that does what the `updates` (each the parts of a delta, oldest first) do one after another.

    Raises InvalidWeightsError where they are not consecutive SX deltas of one run, CorruptObjectError where one is
    damaged.
    """
    return collect(iter_fold(updates))


def iter_fold(updates: Sequence[Sequence[Source]]) -> Iterator[bytes]:
    """The parts of `fold`, one at a time: memory for the changes of one part of each update."""
    surveys = [survey(parts) for parts in updates]
    if not surveys:
        raise InvalidWeightsError("there is no delta to fold")
    for first, second in pairwise(surveys):
        _check_consecutive(first, second)
    if any(found.info.kind is not UpdateKind.DELTA or found.info.codec is Codec.XC for found in surveys):
        raise InvalidWeightsError("only sx deltas fold: keep those in the store")
    first, last = surveys[0].info, surveys[-1].info
    template = UpdateInfo(
        kind=UpdateKind.DELTA,
        codec=Codec.SX,
        run_id=first.run_id,
        base_version=first.base_version,
        target_version=last.target_version,
        base_root=first.base_root,
        target_root=last.target_root,
        shards=first.shards,
        bytes=0,
        full_bytes=0,
        changed=0,
        parameters=0,
    )
    return _fold_parts(template, surveys[-1], updates)


def _check_consecutive(first: Survey, second: Survey) -> None:
    one, two = first.info, second.info
    if (one.run_id, one.target_version, one.target_root) != (two.run_id, two.base_version, two.base_root):
        raise InvalidWeightsError(
            f"the delta from version {two.base_version} does not follow the one to version {one.target_version}"
        )
    if first.forms != second.forms or one.shards != two.shards:
        raise InvalidWeightsError("the deltas are cut differently: they do not fold")


def _fold_parts(template: UpdateInfo, last: Survey, updates: Sequence[Sequence[Source]]) -> Iterator[bytes]:
    for shard in range(template.shards):
        parts = [_part_of(sources, shard) for sources in updates]
        layout = parts[0].layout
        if any(part.layout != layout for part in parts):
            raise InvalidWeightsError("the deltas are cut differently: they do not fold")
        payloads: list[bytes] = []
        changed = 0
        for chunk in layout.chunks:
            payload, number = _fold_chunk(parts, chunk)
            payloads.append(payload)
            changed += number
        digests = [last.digests[form.name] for form in layout.forms]
        yield build_part(part_info(template, layout, changed), shard, layout, digests, payloads)


def _part_of(sources: Sequence[Source], shard: int) -> Part:
    """The part with this number: parts are stored in order, but need not be."""
    for source in (*sources[shard : shard + 1], *sources):
        part = parse_part(load_part(source))
        if part.shard == shard:
            return part
    raise CorruptObjectError(f"part {shard} of an update is gone: fetch it again")


def _fold_chunk(parts: Sequence[Part], chunk: Chunk) -> tuple[bytes, int]:
    total: Decoded | None = None
    for part in parts:
        payload = part.payloads.get(chunk.key)
        if payload is not None:
            if payload[0] == Encoding.XC:
                raise InvalidWeightsError("only sx deltas fold: keep those in the store")
            step = decode_chunk(payload, chunk, None)
            total = step if total is None else add(total, step)
    if total is None:
        return b"", 0
    if isinstance(total, Whole):
        return encode_values(total.values), chunk.count
    changes = as_changes(total)
    return (encode_changes(changes) if changes.positions.size else b""), changes.positions.size


def add(first: Decoded, second: Decoded) -> Decoded:
    """`second` after `first`."""
    if isinstance(second, Whole):
        return second
    if isinstance(first, Whole):
        return Whole(values=first.values + as_differences(second))
    if isinstance(first, Split) or isinstance(second, Split):
        return Split(differences=as_differences(first) + as_differences(second))
    return add_changes(first, second)


def add_changes(first: Changes, second: Changes) -> Changes:
    """Sums of differences at the union of positions, without the sums that are zero."""
    positions = np.concatenate((first.positions, second.positions))
    order = np.argsort(positions, kind="stable")
    positions = positions[order]
    differences = np.concatenate((first.differences, second.differences))[order]
    twice = np.flatnonzero(positions[1:] == positions[:-1])
    differences[twice] += differences[twice + 1]
    kept = differences != 0
    kept[twice + 1] = False
    return Changes(count=first.count, positions=positions[kept], differences=differences[kept])

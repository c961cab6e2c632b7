"""Squashing: consecutive deltas become one without the weights, chunk by chunk: the differences of all elements of one.

Differences add modulo 2^bits, and those that come to zero fall out. Whole values replace what came before them. XC
needs its base to be read at all, so a store that squashes keeps SX deltas.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np

from services.runtime.errors import CorruptObjectError, InvalidWeightsError
from services.wire.delta.codec import Codec, Whole, decode_chunk, encode_values
from services.wire.delta.decode import Source, Survey, survey
from services.wire.delta.dense import changes_of_split
from services.wire.delta.density import Encoding, Split, encode_changes
from services.wire.delta.encode import collect, part_info
from services.wire.delta.layout import Chunk
from services.wire.delta.part import Part, build_part, load_part, parse_part
from services.wire.delta.tensors import BITS_TYPE, ITEM_BYTES
from services.wire.delta.update import EncodedUpdate, UpdateInfo, UpdateKind


def fold(updates: Sequence[Sequence[Source]], workers: int = 1) -> EncodedUpdate:
    """One delta that does what the `updates` (each the parts of a delta, oldest first) do one after another.

    Raises InvalidWeightsError where they are not consecutive SX deltas of one run, CorruptObjectError where one is
    damaged.
    """
    return collect(iter_fold(updates, workers))


def iter_fold(updates: Sequence[Sequence[Source]], workers: int = 1) -> Iterator[bytes]:
    """The parts of `fold`, one at a time: memory for one part of each update, and for a chunk of each worker."""
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
    return _fold_parts(template, surveys[-1], updates, workers)


def _check_consecutive(first: Survey, second: Survey) -> None:
    one, two = first.info, second.info
    if (one.run_id, one.target_version, one.target_root) != (two.run_id, two.base_version, two.base_root):
        raise InvalidWeightsError(
            f"the delta from version {two.base_version} does not follow the one to version {one.target_version}"
        )
    if first.forms != second.forms or one.shards != two.shards:
        raise InvalidWeightsError("the deltas are cut differently: they do not fold")


def _fold_parts(
    template: UpdateInfo, last: Survey, updates: Sequence[Sequence[Source]], workers: int
) -> Iterator[bytes]:
    with ThreadPoolExecutor(workers, thread_name_prefix="fold") as pool:
        for shard in range(template.shards):
            parts = [_part_of(sources, shard) for sources in updates]
            layout = parts[0].layout
            if any(part.layout != layout for part in parts):
                raise InvalidWeightsError("the deltas are cut differently: they do not fold")
            folded = list(pool.map(partial(_fold_chunk, parts), layout.chunks))
            info = part_info(template, layout, sum(changed for _, changed in folded))
            digests = [last.digests[form.name] for form in layout.forms]
            yield build_part(info, shard, layout, digests, [payload for payload, _ in folded])


def _part_of(sources: Sequence[Source], shard: int) -> Part:
    """The part with this number: parts are stored in order, but need not be."""
    for source in (*sources[shard : shard + 1], *sources):
        part = parse_part(load_part(source))
        if part.shard == shard:
            return part
    raise CorruptObjectError(f"part {shard} of an update is gone: fetch it again")


def _fold_chunk(parts: Sequence[Part], chunk: Chunk) -> tuple[bytes, int]:
    """The payload that does what those of `parts` do one after another, and the number of changes."""
    payloads = [payload for part in parts if (payload := part.payloads.get(chunk.key)) is not None]
    if any(bytes(payload[:1]) == bytes((Encoding.XC,)) for payload in payloads):
        raise InvalidWeightsError("only sx deltas fold: keep those in the store")
    if not payloads:
        return b"", 0
    total = np.zeros(chunk.count, BITS_TYPE[ITEM_BYTES[chunk.dtype]])
    whole = False
    for payload in payloads:
        step = decode_chunk(payload, chunk, None)
        if isinstance(step, Whole):
            np.copyto(total, step.values)
            whole = True
        elif isinstance(step, Split):
            total += step.differences
        else:
            total[step.positions] += step.differences
    if whole:
        return encode_values(total), chunk.count
    changes = changes_of_split(total)
    return (encode_changes(changes) if changes.positions.size else b""), changes.positions.size

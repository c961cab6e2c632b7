"""Parts to weights: out of place, verified, all or nothing.

    parts ─► check each alone ─► check them together ─► chunks on threads into new arrays, hashed ─► weights

Guarantee: what is returned has the target root that the update names. The other checks only refuse sooner and say why.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from services.runtime.errors import CorruptObjectError
from services.wire.delta.codec import WrongBaseError, decode_chunk, write_chunk
from services.wire.delta.density import Encoding
from services.wire.delta.layout import Chunk, Segment
from services.wire.delta.memory import Memory
from services.wire.delta.part import Part, load_part, parse_part
from services.wire.delta.tensors import (
    BITS_TYPE,
    BitTensor,
    RunningDigests,
    TensorForm,
    Weights,
    forms_of,
    root_of,
    root_of_digests,
)
from services.wire.delta.update import UpdateInfo, UpdateKind, merge_infos
from services.wire.delta.validate import check_same_forms

Source = bytes | Path
ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What all parts of one update say together."""

    info: UpdateInfo
    forms: list[TensorForm]
    """Sorted by name."""

    digests: dict[str, bytes]


def inspect(sources: Sequence[Source]) -> UpdateInfo:
    """What an update is, with every part checked but nothing decoded. Raises BadInputError or InputMissingError."""
    return survey(sources).info


def apply_update(
    parts: Sequence[Source],
    base: Weights | None,
    *,
    expect_root: str | None = None,
    expect_bytes: int | None = None,
    workers: int = 1,
    staging: Weights | None = None,
) -> dict[str, BitTensor]:
    """The target weights in new arrays; `base` is only read and may be None for a keyframe.

    `staging`: weights of this model that nobody needs any more, such as the version before the base. Their memory is
    used again (twice as fast as new memory), and holds nothing of use after an error.

    Memory: the result, and one part at a time where the parts are paths. Raises WrongBaseError (sound update, other
    base: needs a new plan), CorruptObjectError (damaged: fetch again), InvalidWeightsError (another model). Nothing is
    returned unless all of it is verified, and `expect_root`, where given, must be the update's target. `expect_bytes`,
    where given, is what the weights take: a few bytes may claim any size, and it is refused before it is allocated.
    """
    whole = survey(parts)
    info = whole.info
    if expect_root is not None and expect_root != info.target_root:
        raise CorruptObjectError("the update leads to another root than its manifest says: fetch a keyframe")
    if expect_bytes is not None and expect_bytes != info.full_bytes:
        raise CorruptObjectError("the update is of weights of another size than its manifest says: fetch a keyframe")
    if info.kind is UpdateKind.DELTA:
        if base is None:
            raise WrongBaseError(f"this is a change of version {info.base_version}: give that version as its base")
        check_same_forms(whole.forms, forms_of(base), "the update's tensors")
    else:
        base = None
    out = dict(staging) if staging is not None and can_stage(staging, base, whole.forms) else allocate(whole.forms)
    running = RunningDigests()
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            for part in load_parts(parts):
                jobs = [pool.submit(_decode_into, part, chunk, base, out, running) for chunk in part.layout.chunks]
                for job in jobs:
                    job.result()
            names = sorted(out)
            found = zip(names, pool.map(running.of, names, (out[name].bits for name in names)), strict=True)
            damaged = [name for name, digest in found if digest != whole.digests[name]]
        if damaged:
            raise CorruptObjectError(f"{damaged[0]} does not have its digest after the update: fetch a keyframe")
    except CorruptObjectError as error:
        # Only now is the base hashed: a sound base costs nothing, and a wrong one explains every other error.
        if base is not None and root_of(base, workers) != info.base_root:
            raise WrongBaseError(
                f"the base is not version {info.base_version} of this run: ask for an update from what is really there"
            ) from error
        raise
    return out


def can_stage(staging: Weights, base: Weights | None, forms: Sequence[TensorForm]) -> bool:
    """Whether these tensors fit, can be written, and share no memory with each other or with the base."""
    if forms_of(staging) != list(forms) or not all(tensor.bits.flags.writeable for tensor in staging.values()):
        return False
    ours = [tensor.bits for tensor in staging.values() if tensor.bits.size]
    others = [] if base is None else [tensor.bits for tensor in base.values() if tensor.bits.size]
    places = sorted(
        (bits.ctypes.data, bits.nbytes, mine) for arrays, mine in ((ours, 1), (others, 0)) for bits in arrays
    )
    # Tensors of the base may share memory; but where one of ours begins, all have ended, and where one of the base's
    # does, all of ours.
    end = end_of_ours = 0
    for start, size, mine in places:
        if start < (end if mine else end_of_ours):
            return False
        end = max(end, start + size)
        if mine:
            end_of_ours = max(end_of_ours, start + size)
    return True


def allocate(forms: Sequence[TensorForm], memory: Memory | None = None) -> dict[str, BitTensor]:
    """Tensors in one block of memory, which the system backs with huge pages: else every 4 KiB cost a page fault.
    `memory`: of the versions before, where there is any."""
    sizes = [-(-form.elements * form.item_bytes // ALIGNMENT) * ALIGNMENT for form in forms]
    arena = np.empty(sum(sizes), np.uint8) if memory is None else memory.take(sum(sizes))
    tensors: dict[str, BitTensor] = {}
    for form, start in zip(forms, accumulate(sizes, initial=0), strict=False):
        data = arena[start : start + form.elements * form.item_bytes]
        tensors[form.name] = BitTensor(dtype=form.dtype, shape=form.shape, bits=data.view(BITS_TYPE[form.item_bytes]))
    return tensors


def load_parts(sources: Sequence[Source]) -> Iterator[Part]:
    """The parts one at a time, checked. Raises CorruptObjectError, which names the file where there is one."""
    for source in sources:
        try:
            part = parse_part(load_part(source))
        except CorruptObjectError as error:
            if isinstance(source, Path):
                raise CorruptObjectError(f"{source.name}: {error}") from error
            raise
        yield part


def survey(sources: Sequence[Source]) -> Survey:
    """As survey_parts. Raises CorruptObjectError."""
    return survey_parts(load_parts(sources))


def survey_parts(parts: Iterable[Part]) -> Survey:
    """Checks that the parts are one whole update: each shard and element once, digests that make the target root.

    Raises CorruptObjectError.
    """
    infos: list[UpdateInfo] = []
    named: UpdateInfo | None = None
    """The first part that names the root: all that do must agree."""
    shards: set[int] = set()
    forms: dict[str, TensorForm] = {}
    digests: dict[str, bytes] = {}
    segments: dict[str, list[Segment]] = {}
    for part in parts:
        infos.append(part.info)
        shards.add(part.shard)
        named = named or (part.info if part.info.target_root else None)
        if not part.info.same_update(infos[0]) or (named is not None and not part.info.same_update(named)):
            raise CorruptObjectError("the parts belong to different updates: fetch them again")
        for form in part.layout.forms:
            known = forms.setdefault(form.name, form), digests.setdefault(form.name, part.digests[form.name])
            if known != (form, part.digests[form.name]):
                raise CorruptObjectError(f"the parts of an update disagree about {form.name}: fetch them again")
        _check_base_needed(part)
        for chunk in part.layout.chunks:
            for segment in chunk.segments:
                segments.setdefault(segment.name, []).append(segment)
    if not infos:
        raise CorruptObjectError("there is no part of a weight update")
    if len(shards) != len(infos):
        raise CorruptObjectError("a part of a weight update is there more than once: give each once")
    if len(infos) != infos[0].shards:
        raise CorruptObjectError(
            f"{len(shards)} of the {infos[0].shards} parts of a weight update are there: fetch all, each once"
        )
    for form in forms.values():
        _check_cover(form, segments.get(form.name, []))
    info = merge_infos(infos)
    if root_of_digests(forms.values(), digests) != info.target_root:
        raise CorruptObjectError("the digests of an update do not make its target root: fetch a keyframe")
    return Survey(info=info, forms=[forms[name] for name in sorted(forms)], digests=digests)


def _check_base_needed(part: Part) -> None:
    """A keyframe has the values of every chunk: decoding it never needs a base."""
    if part.info.kind is not UpdateKind.KEYFRAME:
        return
    if len(part.payloads) != len(part.layout.chunks):
        raise CorruptObjectError("a keyframe lacks some of its chunks: fetch it again")
    if any(bytes(payload[:1]) != bytes((Encoding.WHOLE,)) for payload in part.payloads.values()):
        raise CorruptObjectError("a keyframe has changes in the place of values: fetch it again")


def _check_cover(form: TensorForm, segments: list[Segment]) -> None:
    """The segments are the tensor, each element once. The result is allocated only after this."""
    end = 0
    for segment in sorted(segments, key=lambda segment: segment.start):
        if segment.start != end:
            raise CorruptObjectError(f"an update covers {form.name} with a hole or twice: fetch it again")
        end += segment.count
    if end != form.elements:
        raise CorruptObjectError(f"an update covers only {end} of {form.elements} elements of {form.name}")


def _decode_into(part: Part, chunk: Chunk, base: Weights | None, out: Weights, running: RunningDigests) -> None:
    payload = part.payloads.get(chunk.key)
    decoded = None if payload is None else decode_chunk(payload, chunk, base)
    write_chunk(decoded, chunk, base, out, running)

"""Weights to parts, on threads, one part after another. Files name the result in every part, so all is hashed first;
what is sent while it is made names it in the last one.

digests(new) ─► target root ─► [chunk chunk …] ─► part 0 ─► [chunk chunk …] ─► part 1 …
root_last:  [digest chunk chunk …] ─► part 0 ─► [digest chunk chunk …] ─► part 1 … ─► target root ─► last part
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, islice

from services.runtime.errors import InvalidWeightsError
from services.wire.delta.codec import Codec, Comparison, HostComparison, encode_change, encode_whole
from services.wire.delta.layout import Chunk, PartLayout, plan_parts
from services.wire.delta.part import build_part, parse_part
from services.wire.delta.tensors import Weights, digest_jobs, digests_of, forms_of, root_of, root_of_digests
from services.wire.delta.update import (
    MAX_RUN_ID_CHARS,
    MAX_VERSION,
    EncodedUpdate,
    UpdateInfo,
    UpdateKind,
    is_root,
    merge_infos,
)
from services.wire.delta.validate import check_same_forms

Payload = tuple[bytes, int]


def encode_keyframe(
    weights: Weights, *, run_id: str, version: int, workers: int = 1, digests: Mapping[str, bytes] | None = None
) -> EncodedUpdate:
    """The whole weights. Raises InvalidWeightsError. `digests` as from `digests_of(weights)`, if they are known."""
    return collect(iter_encode(None, weights, run_id=run_id, target_version=version, workers=workers, digests=digests))


def encode_delta(
    base: Weights,
    new: Weights,
    *,
    run_id: str,
    base_version: int,
    target_version: int,
    base_root: str | None = None,
    codec: Codec | str = Codec.SX,
    workers: int = 1,
    digests: Mapping[str, bytes] | None = None,
    root_last: bool = False,
) -> EncodedUpdate:
    """What turns `base` into `new`, bit for bit.

    `base_root` saves hashing the base, `digests` (of `new`) saves hashing the new weights. `root_last` as in
    `iter_encode`. Raises InvalidWeightsError where the two are not of one model.
    """
    return collect(
        iter_encode(
            base,
            new,
            run_id=run_id,
            base_version=base_version,
            target_version=target_version,
            base_root=base_root,
            codec=codec,
            workers=workers,
            digests=digests,
            root_last=root_last,
        )
    )


def iter_encode(
    base: Weights | None,
    new: Weights,
    *,
    run_id: str,
    target_version: int,
    base_version: int | None = None,
    base_root: str | None = None,
    codec: Codec | str = Codec.SX,
    workers: int = 1,
    digests: Mapping[str, bytes] | None = None,
    comparison: Comparison | None = None,
    root_last: bool = False,
) -> Iterator[bytes]:
    """The parts in order; a keyframe where `base` is None. `comparison` of these two, where they lie on a device too.
    `root_last`: the first part does not wait until all of `new` is hashed, and only the last one names the target root.

    Memory: the payloads of the part being built and at most 2 chunks per worker ahead of it, whatever the model.
    """
    forms = forms_of(new)
    if base is not None:
        if codec not in (Codec.SX, Codec.XC):
            raise InvalidWeightsError(f"a delta's codec is sx or xc, not {str(codec)[:20]!r}")
        check_same_forms(forms, forms_of(base), "the new weights")
    if digests is None:
        digests = {} if root_last else digests_of(new, workers)
    layouts = plan_parts(forms)
    template = UpdateInfo(
        kind=UpdateKind.KEYFRAME if base is None else UpdateKind.DELTA,
        codec=Codec.KEYFRAME if base is None else Codec(codec),
        run_id=_checked_run_id(run_id),
        base_version=None if base is None else _checked_version(base_version),
        target_version=_checked_version(target_version),
        base_root=None if base is None else _checked_root(base_root or root_of(base, workers)),
        target_root=root_of_digests(forms, digests) if not root_last or len(digests) == len(forms) else "",
        shards=len(layouts),
        bytes=0,
        full_bytes=0,
        changed=0,
        parameters=0,
    )
    if base is not None and comparison is None:
        comparison = HostComparison(base=base, new=new)
    return _build_parts(template, comparison, new, layouts, digests, workers)


def part_info(template: UpdateInfo, layout: PartLayout, changed: int) -> UpdateInfo:
    """The template with the sizes of one part."""
    item_bytes = {form.name: form.item_bytes for form in layout.forms}
    full_bytes = sum(chunk.count * item_bytes[chunk.segments[0].name] for chunk in layout.chunks)
    parameters = sum(chunk.count for chunk in layout.chunks)
    return UpdateInfo(
        kind=template.kind,
        codec=template.codec,
        run_id=template.run_id,
        base_version=template.base_version,
        target_version=template.target_version,
        base_root=template.base_root,
        target_root=template.target_root,
        shards=template.shards,
        bytes=0,
        full_bytes=full_bytes,
        changed=changed,
        parameters=parameters,
    )


def collect(parts: Iterator[bytes]) -> EncodedUpdate:
    """All parts in memory, with the info of the whole."""
    kept = tuple(parts)
    return EncodedUpdate(info=merge_infos([parse_part(part).info for part in kept]), parts=kept)


def _build_parts(
    template: UpdateInfo,
    comparison: Comparison | None,
    new: Weights,
    layouts: list[PartLayout],
    known_digests: Mapping[str, bytes],
    workers: int,
) -> Iterator[bytes]:
    digests = dict(known_digests)

    def digest(job: Callable[[], dict[str, bytes]]) -> Payload:
        digests.update(job())
        return b"", 0

    def encode(chunk: Chunk) -> Payload:
        if comparison is None:
            return encode_whole(new, chunk), chunk.count
        return encode_change(comparison, chunk, template.codec)

    hashing = [[partial(digest, job) for job in jobs] for jobs in _digests_for_each(layouts, new, digests)]
    encoding = [[partial(encode, chunk) for chunk in layout.chunks] for layout in layouts]
    jobs = (job for one in zip(hashing, encoding, strict=True) for job in chain(*one))
    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        payloads = in_order(pool, jobs, 2 * workers)
        for shard, layout in enumerate(layouts):
            results = list(islice(payloads, len(hashing[shard]) + len(layout.chunks)))[len(hashing[shard]) :]
            if shard == len(layouts) - 1 and not template.target_root:
                template = replace(template, target_root=root_of_digests(forms_of(new), digests))
            info = part_info(template, layout, sum(changed for _, changed in results))
            row = [digests[form.name] for form in layout.forms]
            yield build_part(info, shard, layout, row, [payload for payload, _ in results])


def _digests_for_each(
    layouts: Iterable[PartLayout], new: Weights, known: Mapping[str, bytes]
) -> Iterator[list[Callable[[], dict[str, bytes]]]]:
    """For each part the jobs that find the digests which it is the first to need."""
    unknown = new.keys() - known.keys()
    for layout in layouts:
        names = [form.name for form in layout.forms if form.name in unknown]
        unknown.difference_update(names)
        yield digest_jobs(new, names)


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Payload]], ahead: int) -> Iterator[Payload]:
    """What the jobs return. While the caller does something with one, up to `ahead` more are worked on."""
    begun: deque[Future[Payload]] = deque()
    for job in jobs:
        begun.append(pool.submit(job))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _checked_run_id(run_id: str) -> str:
    if len(run_id) > MAX_RUN_ID_CHARS or not run_id.isprintable():
        raise InvalidWeightsError(f"a run id is printable text of at most {MAX_RUN_ID_CHARS} characters")
    return run_id


def _checked_version(version: int | None) -> int:
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise InvalidWeightsError(f"a policy version is a number from 0 to {MAX_VERSION}, not {version}")
    return version


def _checked_root(root: str) -> str:
    if not is_root(root):
        raise InvalidWeightsError("a root digest has 64 lower-case hexadecimal digits")
    return root

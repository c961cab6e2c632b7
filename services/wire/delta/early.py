"""A delta decoded while its parts are still on their way, so that little is left to do when the last one is there.

    part ─► chunks on threads into staging, hashed; their new values finite, not exploded ─► digests of whole tensors
    └─► the next part's chunks follow before all of these are done
    the last one too ─► survey of all parts ─► their digests are those that were found ─► weights

This only works ahead. Whatever does not fit ends it without a word: `finish` then has nothing, and apply_update and
validate_names_shapes say what is wrong. Guarantee: what `finish` returns has the expected root, and would pass both.
"""

from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from services.runtime.errors import HeteroRLError
from services.wire.delta.codec import decode_chunk, write_chunk
from services.wire.delta.decode import allocate, can_stage, survey_parts
from services.wire.delta.layout import Chunk, Segment
from services.wire.delta.part import Part, load_part, parse_part
from services.wire.delta.tensors import BitTensor, RunningDigests, Weights, forms_of
from services.wire.delta.validate import may_follow


class EarlyDecoder:
    """For one delta from `base`, into the memory of `staging`, weights of this model that nobody needs any more.

    `base` has passed validate_names_shapes: what did not change is not looked at again. `level`: `staging` is a copy of
    `base`, of which only what changed is written.
    """

    def __init__(self, base: Weights, staging: Weights, *, base_root: str, workers: int, level: bool = False) -> None:
        forms = forms_of(base)
        self._forms = {form.name: form for form in forms}
        self._base = base
        self._out = dict(staging)
        self._base_root = base_root
        self._level = level
        self._parts: list[Part] = []
        """Those that were decoded, without their payloads."""
        self._missing = Counter({form.name: form.elements for form in forms})
        self._running = RunningDigests()
        self._digests: dict[str, bytes] = {}
        self._peaks: dict[str, int] = {}
        self._fits = can_stage(staging, base, forms)
        self._begun: deque[tuple[Part, list[Future[dict[str, int]]]]] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def add(self, path: Path) -> None:
        """Begins with the next part, and ends the one before. Blocks."""
        if not self._fits:
            return
        try:
            part = parse_part(load_part(path))
            self._fits = self._belongs(part)
            if self._fits:
                jobs = [self._pool.submit(self._decode_chunk, part, chunk) for chunk in part.layout.chunks]
                self._begun.append((part, jobs))
            while len(self._begun) > 1:
                self._end_oldest()
        except HeteroRLError:
            self._fits = False

    def close(self) -> None:
        """From now on nothing is written to `staging`. To be called at last, however it went. Blocks."""
        self._pool.shutdown(cancel_futures=True)

    def finish(self, root: str) -> dict[str, BitTensor] | None:
        """The weights once every part was added; None where it cannot be vouched that `root` is theirs. Blocks."""
        if not self._fits:
            return None
        try:
            while self._begun:
                self._end_oldest()
            self._conclude(self._forms.keys() - self._digests.keys())
            whole = survey_parts(self._parts)
        except HeteroRLError:
            return None
        if not all(may_follow(self._out[name], self._base[name], peak) for name, peak in self._peaks.items()):
            return None
        if whole.info.target_root != root or whole.forms != list(self._forms.values()):
            return None
        return self._out if whole.digests == self._digests else None

    def _belongs(self, part: Part) -> bool:
        """Whether it changes this base, and tensors of this base alone."""
        named = all(self._forms.get(form.name) == form for form in part.layout.forms)
        return named and part.info.base_root == self._base_root

    def _end_oldest(self) -> None:
        """What is known once all chunks of a part are written."""
        part, jobs = self._begun.popleft()
        written: dict[str, list[Segment]] = {}
        for job in jobs:
            for name, peak in job.result().items():
                self._peaks[name] = max(peak, self._peaks.get(name, 0))
        for chunk in part.layout.chunks:
            for segment in chunk.segments:
                self._missing[segment.name] -= segment.count
                written.setdefault(segment.name, []).append(segment)
        for name, segments in written.items():
            if self._missing[name]:  # one by one: what lies between them is not there yet, where a part has holes
                for one in sorted(segments, key=lambda one: one.start):
                    self._running.advance(name, self._out[name].bits, one.start, one.start + one.count)
        self._conclude({name for name in written if self._missing[name] == 0})
        self._parts.append(replace(part, payloads={}))

    def _decode_chunk(self, part: Part, chunk: Chunk) -> dict[str, int]:
        """Returns the peaks."""
        payload = part.payloads.get(chunk.key)
        decoded = None if payload is None else decode_chunk(payload, chunk, self._base)
        peaks: dict[str, int] = {}
        write_chunk(decoded, chunk, self._base, self._out, self._running, peaks, self._level)
        return peaks

    def _conclude(self, names: set[str]) -> None:
        """Digests of tensors that are whole."""
        self._digests |= {name: self._running.of(name, self._out[name].bits) for name in names}


def copy_of(base: Weights, workers: int) -> dict[str, BitTensor]:
    """In new memory. Blocks."""
    copy = allocate(forms_of(base))
    copy_into(copy, base, workers)
    return copy


def copy_into(staging: Weights, base: Weights, workers: int) -> bool:
    """Makes `staging` a copy of `base`; False, and untouched, where it cannot stage it. Blocks."""
    if not can_stage(staging, base, forms_of(base)):
        return False
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for job in [pool.submit(np.copyto, staging[name].bits, base[name].bits) for name in base]:
            job.result()
    return True

"""A delta decoded while its parts are still on their way, so that little is left to do when the last one is there.

    part ─► chunks on threads into staging ─► tensors that are whole now ─► digest, finite, not exploded
    last part ─► survey of all parts ─► their digests are those that were found ─► weights

This only works ahead. Whatever does not fit ends it without a word: `finish` then has nothing, and apply_update and
validate_names_shapes say what is wrong. Guarantee: what `finish` returns has the expected root, and passed both.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from services.runtime.errors import HeteroRLError
from services.wire.delta.codec import decode_chunk, write_chunk
from services.wire.delta.decode import survey
from services.wire.delta.layout import Chunk
from services.wire.delta.part import Part, load_part, parse_part
from services.wire.delta.tensors import BitTensor, Weights, digests_of, forms_of
from services.wire.delta.validate import validate_names_shapes


class EarlyDecoder:
    """For one delta from `base`, into the memory of `staging`, weights of this model that nobody needs any more."""

    def __init__(self, base: Weights, staging: Weights, *, base_root: str, target_root: str, workers: int) -> None:
        forms = forms_of(base)
        self._forms = {form.name: form for form in forms}
        self._base = base
        self._out = dict(staging)
        self._roots = (base_root, target_root)
        self._workers = workers
        self._missing = Counter({form.name: form.elements for form in forms})
        self._digests: dict[str, bytes] = {}
        self._fits = forms_of(staging) == forms and all(_is_free(staging[form.name], base[form.name]) for form in forms)

    def add(self, path: Path) -> None:
        """Decodes the next part. Blocks."""
        if not self._fits:
            return
        try:
            part = parse_part(load_part(path))
            self._fits = self._belongs(part)
            if self._fits:
                self._decode(part)
        except HeteroRLError:
            self._fits = False

    def finish(self, paths: Sequence[Path]) -> dict[str, BitTensor] | None:
        """The weights once every part was added; None where they cannot be vouched for. Blocks."""
        if not self._fits:
            return None
        try:
            self._look_at(self._forms.keys() - self._digests.keys())
            whole = survey(paths)
        except HeteroRLError:
            return None
        if whole.info.target_root != self._roots[1] or whole.forms != list(self._forms.values()):
            return None
        return self._out if whole.digests == self._digests else None

    def _belongs(self, part: Part) -> bool:
        """Whether it changes this base, and tensors of this base alone."""
        named = all(self._forms.get(form.name) == form for form in part.layout.forms)
        return named and (part.info.base_root, part.info.target_root) == self._roots

    def _decode(self, part: Part) -> None:
        with ThreadPoolExecutor(self._workers, thread_name_prefix="decode") as pool:
            for job in [pool.submit(self._decode_chunk, part, chunk) for chunk in part.layout.chunks]:
                job.result()
        touched: set[str] = set()
        for chunk in part.layout.chunks:
            for segment in chunk.segments:
                self._missing[segment.name] -= segment.count
                touched.add(segment.name)
        self._look_at({name for name in touched if self._missing[name] == 0})

    def _decode_chunk(self, part: Part, chunk: Chunk) -> None:
        payload = part.payloads.get(chunk.key)
        decoded = None if payload is None else decode_chunk(payload, chunk, self._base)
        write_chunk(decoded, chunk, self._base, self._out)

    def _look_at(self, names: set[str]) -> None:
        """Digests of tensors that are whole. Raises InvalidWeightsError for values that no policy may have."""
        ours, theirs = ({name: weights[name] for name in names} for weights in (self._out, self._base))
        self._digests |= digests_of(ours, self._workers)
        validate_names_shapes(ours, theirs, self._workers)


def _is_free(tensor: BitTensor, base: BitTensor) -> bool:
    return tensor.bits.flags.writeable and not np.may_share_memory(tensor.bits, base.bits)

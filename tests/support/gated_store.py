"""A learner that stops in the middle of an update, and a sampler that waits for the rest."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

from services.wire.delta import BitTensor, Weights, root_of
from services.wire.types import ObjectRef
from tests.support.weight_site import LearnerSite


class Gate:
    """Lets a store keep so many objects, and then holds it."""

    def __init__(self, site: LearnerSite, objects: int) -> None:
        self._write = site.store.write
        self._free = threading.Semaphore(objects)
        self._more = threading.Condition()
        self.kept: list[ObjectRef] = []

    def write(self, data: bytes) -> ObjectRef:
        assert self._free.acquire(timeout=20)
        with self._more:
            self.kept.append(self._write(data))
            self._more.notify_all()
            return self.kept[-1]

    def wait_for(self, objects: int) -> None:
        """Blocks until so many are kept."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.kept) >= objects, timeout=20)

    def open(self, objects: int = 1000) -> None:
        self._free.release(objects)


@contextmanager
def gated(site: LearnerSite, objects: int) -> Generator[Gate]:
    gate = Gate(site, objects)
    site.store.write = gate.write  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.open()
        del site.store.write


def own(weights: Weights) -> tuple[Weights, int, str]:
    """Version 0 in memory of a sampler's own, which it uses again."""
    copy = {name: BitTensor(dtype=old.dtype, shape=old.shape, bits=old.bits.copy()) for name, old in weights.items()}
    return copy, 0, root_of(weights)

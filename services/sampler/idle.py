"""How long the engine had nothing to do, and why: the first question when a sampler is slow."""

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from enum import StrEnum


class IdleReason(StrEnum):
    """Why no group was in the engine. Where several apply, a moment counts for the first in this order."""

    STARTING = "starting"
    """Fetching the model, the first weights, building the engine."""
    DRAINING = "draining"
    """On the way out."""
    SPOOL_FULL = "spool_full"
    """The spool is near its budget, or its disk is full: the learner does not take groups as fast as they come."""
    WAITING_FOR_WEIGHTS = "waiting_for_weights"
    """The leases at hand need a newer version."""
    PAUSED = "paused"
    """An operator paused this sampler."""
    WAITING_FOR_LEASES = "waiting_for_leases"
    """The learner was asked for more and granted none: it is ahead, away, or done."""
    SCORING = "scoring"
    """Every lease that this sampler may hold is at the graders: they are slower than the engine."""
    SWAPPING = "swapping"
    """There were groups, and they stood still while new weights were put in."""


class IdleTime:
    """A stop-watch per reason, told of what goes on in the sampler. It begins with STARTING."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._present = Counter({IdleReason.STARTING: 1})
        self._reason: IdleReason | None = IdleReason.STARTING
        self._since = clock()
        self._seconds: dict[str, float] = {reason.value: 0.0 for reason in IdleReason}
        self.groups_in_engine = 0

    def set(self, reason: IdleReason, present: bool) -> None:
        """A state of the whole sampler begins or ends."""
        self._present[reason] = int(present)
        self._note()

    @contextmanager
    def held_up_by(self, reason: IdleReason) -> Generator[None]:
        """One piece of work waits inside."""
        self._present[reason] += 1
        self._note()
        try:
            yield
        finally:
            self._present[reason] -= 1
            self._note()

    @contextmanager
    def generating(self) -> Generator[None]:
        """A group is in the engine inside."""
        self.groups_in_engine += 1
        self._note()
        try:
            yield
        finally:
            self.groups_in_engine -= 1
            self._note()

    def swapped(self, seconds: float) -> None:
        """A pause of the engine's work has ended; if it had none, the time counts for another reason."""
        if self._reason is None:
            self._seconds[IdleReason.SWAPPING] += seconds

    def seconds(self) -> Mapping[str, float]:
        """By reason, until now."""
        self._note()
        return self._seconds

    def _note(self) -> None:
        now = self._clock()
        if self._reason is not None:
            self._seconds[self._reason] += now - self._since
        self._since = now
        self._reason = None if self.groups_in_engine else self._first_present()

    def _first_present(self) -> IdleReason:
        return next((reason for reason in IdleReason if self._present[reason]), IdleReason.WAITING_FOR_LEASES)

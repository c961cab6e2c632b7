"""Who works for the run: sessions, fencing, reports and what operators asked of each sampler.

The newest registration of a sampler id wins. Its epoch is counted by the journal, so that it rises over restarts of the
learner too; calls with an older one are refused as fenced.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from services.runtime.errors import FencedError, RefusedError, SessionLostError
from services.wire.types import Directive, EngineInfo, SamplerReport, SamplerState, Session

_QUARANTINE_AFTER = 8
"""Invalid groups in a row that put a sampler into quarantine until it registers again."""
_MOST_LOST = 256
"""Lost samplers that are remembered, those seen last: a cloud's hosts come and go under ever new names, and each takes
its place in every status and every scrape."""


class SessionStore(Protocol):
    """What must outlive the process; the journal."""

    async def raise_session_epoch(self, sampler_id: str) -> int: ...

    async def set_denied(self, sampler_id: str, denied: bool) -> None: ...


@dataclass(slots=True, kw_only=True)
class Sampler:
    """One sampler id as this learner process knows it. Times are on the injected monotonic clock."""

    sampler_id: str
    session_epoch: int = 0
    hostname: str = ""
    engine: EngineInfo | None = None
    features: frozenset[str] = frozenset()
    """What it said that it can, of what this build knows."""
    foreign_spool: str = ""
    """A spool that was filled for another run: never accepted."""
    last_seen: float = float("-inf")
    report: SamplerReport | None = None
    registrations: int = 0
    draining: bool = False
    groups_accepted: int = 0
    tokens_accepted: int = 0
    invalid_streak: int = 0
    invalid_for: str = ""
    """Why the last of them was refused."""

    @property
    def restarts(self) -> int:
        """A process registers again by itself only when told to, so further registrations are new processes."""
        return max(0, self.registrations - 1)

    @property
    def quarantined(self) -> bool:
        return self.invalid_streak >= _QUARANTINE_AFTER


class Sessions:
    def __init__(
        self,
        *,
        run_id: str,
        learner_epoch: int,
        ttl_s: float,
        store: SessionStore,
        clock: Callable[[], float],
        denied: Iterable[str] = (),
    ) -> None:
        self.run_id = run_id
        self.learner_epoch = learner_epoch
        self.ttl_s = ttl_s
        self._store = store
        self._clock = clock
        self._samplers: dict[str, Sampler] = {}
        self._denied = set(denied)
        self.paused = False
        self.draining = False

    async def register(
        self,
        sampler_id: str,
        *,
        hostname: str = "",
        engine: EngineInfo | None = None,
        spool_id: str = "",
        last_run_id: str = "",
        features: frozenset[str] = frozenset(),
    ) -> Session:
        """Opens a session and fences every earlier one of this id. Raises RefusedError for an evicted id."""
        self._refuse_denied(sampler_id)
        epoch = await self._store.raise_session_epoch(sampler_id)
        sampler = self._samplers.setdefault(sampler_id, Sampler(sampler_id=sampler_id))
        sampler.registrations += 1
        if epoch > sampler.session_epoch:  # two registrations may wait for the journal at the same time
            sampler.session_epoch = epoch
            sampler.hostname = hostname
            sampler.engine = engine
            sampler.features = features
            sampler.foreign_spool = spool_id if last_run_id not in ("", self.run_id) else ""
            sampler.last_seen = self._clock()
            sampler.report = None
            sampler.draining = False
            sampler.invalid_streak = 0
        self._forget_lost()
        return Session(run_id=self.run_id, sampler_id=sampler_id, learner_epoch=self.learner_epoch, session_epoch=epoch)

    def _forget_lost(self) -> None:
        """One of these that comes back registers again, and gets a session like any other."""
        lost = [sampler for sampler in self._samplers.values() if self.is_lost(sampler)]
        for sampler in sorted(lost, key=lambda sampler: sampler.last_seen, reverse=True)[_MOST_LOST:]:
            del self._samplers[sampler.sampler_id]

    def check(self, session: Session) -> Sampler:
        """The sampler of a current session, marked as seen now.

        Raises FencedError when a newer process registered this id, SessionLostError when the session is of an earlier
        start of the learner or of another run (register again), RefusedError for an evicted id.
        """
        if session.run_id != self.run_id:
            raise SessionLostError(f"this learner serves run {self.run_id!r}, not {session.run_id!r}: register again")
        self._refuse_denied(session.sampler_id)
        sampler = self._samplers.get(session.sampler_id)
        if session.learner_epoch != self.learner_epoch or sampler is None:
            raise SessionLostError(f"session of {session.sampler_id!r} is from an earlier learner: register again")
        if session.session_epoch < sampler.session_epoch:
            raise FencedError(
                f"a newer process registered as {session.sampler_id!r}: give each process its own id, or stop this one"
            )
        if session.session_epoch > sampler.session_epoch:
            raise SessionLostError(f"session of {session.sampler_id!r} is not known here: register again")
        sampler.last_seen = self._clock()
        return sampler

    def heartbeat(self, session: Session, report: SamplerReport) -> Directive:
        """Stores the report and says what to do. Raises as `check` does."""
        sampler = self.check(session)
        sampler.report = report
        sampler.engine = report.engine or sampler.engine
        return self.directive(sampler)

    def directive(self, sampler: Sampler) -> Directive:
        if self.draining or sampler.draining:
            return Directive.DRAIN
        return Directive.PAUSE if self.paused else Directive.CONTINUE

    def is_alive(self, sampler_id: str, session_epoch: int) -> bool:
        """False once the session was lost or evicted. One that a newer session replaced is over, but not lost."""
        sampler = self._samplers.get(sampler_id)
        if sampler is None or sampler_id in self._denied:
            return False
        return sampler.session_epoch != session_epoch or not self.is_lost(sampler)

    def is_lost(self, sampler: Sampler) -> bool:
        return self._clock() - sampler.last_seen > self.ttl_s

    def alive_count(self) -> int:
        return sum(not self.is_lost(sampler) for sampler in self._samplers.values())

    def all_can(self, feature: str) -> bool:
        """Whether there are samplers, and none of a build without this feature: a lost one may come back, too."""
        return bool(self._samplers) and all(feature in sampler.features for sampler in self._samplers.values())

    def state(self, sampler: Sampler) -> SamplerState:
        """Its own report, overruled by what only the learner can know."""
        if self.is_lost(sampler):
            return SamplerState.LOST
        if sampler.draining or self.draining:
            return SamplerState.DRAINING
        return sampler.report.state if sampler.report else SamplerState.STARTING

    def last_seen_s(self, sampler: Sampler) -> float:
        """Seconds since its last call."""
        return self._clock() - sampler.last_seen

    def all(self) -> tuple[Sampler, ...]:
        """Every sampler that registered with this learner process, by id; of lost ones those seen last."""
        return tuple(self._samplers[name] for name in sorted(self._samplers))

    def find(self, sampler_id: str) -> Sampler | None:
        return self._samplers.get(sampler_id)

    def is_evicted(self, sampler_id: str) -> bool:
        return sampler_id in self._denied

    async def evict(self, sampler_id: str, allow: bool = False) -> None:
        """Refuses the id from now on (or no longer), over restarts of the learner too."""
        await self._store.set_denied(sampler_id, not allow)
        (self._denied.discard if allow else self._denied.add)(sampler_id)

    def _refuse_denied(self, sampler_id: str) -> None:
        if sampler_id in self._denied:
            raise RefusedError(f"sampler {sampler_id!r} was evicted from this run: ask its operator to allow it again")

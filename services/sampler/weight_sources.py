"""Where weights come from: a relay of this site while it serves well, else the learner.

    relay ── does not answer, or serves bad bytes ──► set aside ─► learner ── after a while ──► relay again

Announcements always come from the learner: they are small, and so a relay that lags behind, or is cut off, or lies,
cannot hold a sampler back at an old version. Plans and objects, which are the traffic, go by the relay.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from services.runtime.errors import HeteroRLError
from services.runtime.log import get_logger
from services.wire.object_reader import ObjectReader

if TYPE_CHECKING:  # generated stubs exist for type checkers only
    from heterorl.v1.weights_pb2_grpc import WeightServiceAsyncStub

SourceName: TypeAlias = Literal["learner", "relay"]
_STALL_S = 30.0
_ASIDE_S = 30.0
_LONGEST_ASIDE_S = 600.0

_log = get_logger("sampler.weights")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightSource:
    """One end that serves WeightService."""

    name: SourceName
    stub: "WeightServiceAsyncStub"
    readers: tuple[ObjectReader, ...]
    """One per channel: each reads a range of an object."""

    @property
    def is_relay(self) -> bool:
        return self.name == "relay"

    @property
    def wait_for_ready(self) -> bool:
        """A learner is waited for; a relay that cannot be reached is left at once."""
        return not self.is_relay


class WeightSources:
    """`lanes`, `relay_lanes`: more channels to the same ends. `stall_s`: a fetch that brings nothing for so long has
    failed. `aside_s`: the first wait after a failure of the relay, doubled by each further one. `clock` is monotonic
    seconds."""

    def __init__(
        self,
        learner: "WeightServiceAsyncStub",
        relay: "WeightServiceAsyncStub | None" = None,
        *,
        lanes: Sequence["WeightServiceAsyncStub"] = (),
        relay_lanes: Sequence["WeightServiceAsyncStub"] = (),
        stall_s: float = _STALL_S,
        aside_s: float = _ASIDE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        readers = tuple(ObjectReader(stub, stall_s=stall_s) for stub in (learner, *lanes))
        self.learner = WeightSource(name="learner", stub=learner, readers=readers)
        self._relay: WeightSource | None = None
        if relay is not None:
            stubs = (relay, *relay_lanes)
            readers = tuple(ObjectReader(stub, stall_s=stall_s, wait_for_ready=False) for stub in stubs)
            self._relay = WeightSource(name="relay", stub=relay, readers=readers)
        self._first_aside_s = self._aside_s = aside_s
        self._clock = clock
        self._back_at_s = float("-inf")
        self.received_bytes: Counter[SourceName] = Counter()
        """Object bytes by where they came from."""
        self.fallbacks = 0
        """Times that the relay was set aside."""

    @property
    def current(self) -> WeightSource:
        """Where to ask now."""
        if self._relay is None or self._clock() < self._back_at_s:
            return self.learner
        return self._relay

    def failed(self, source: WeightSource, error: HeteroRLError) -> bool:
        """Sets the relay aside. False: `source` is the learner, and there is nobody else to ask."""
        if not source.is_relay:
            return False
        if self.current is source:  # the first to notice; others may have been under way
            self._back_at_s = self._clock() + self._aside_s
            self.fallbacks += 1
            _log.warning("relay_set_aside", error=error, for_s=self._aside_s)
            self._aside_s = min(_LONGEST_ASIDE_S, 2 * self._aside_s)
        return True

    def worked(self, source: WeightSource) -> None:
        """A whole version came from `source` and had its root."""
        if source.is_relay and self.current is source:
            self._aside_s = self._first_aside_s

"""Prometheus metrics of the sampler, `heterorl_sampler_<what>_<unit>`, from the same numbers as its heartbeats."""

import asyncio
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.runtime import metrics
from services.runtime.files import atomic_write
from services.sampler.engine import Engine
from services.sampler.follower import Follower
from services.sampler.rollout import Rollout
from services.sampler.session import LearnerSession
from services.sampler.spool import Spool
from services.sampler.tally import Tally
from services.sampler.weight_sources import WeightSources

ADDRESS_NAME = "metrics_address"
_PREFIX = "heterorl_sampler"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The sampler at one moment."""

    tally: Tally
    spool_groups: int
    spool_bytes: int
    spool_limit_bytes: int
    leases: int
    policy_version: int
    learner_version: int
    engine_restarts: int
    relay_fallbacks: int
    received_bytes: Mapping[str, int]
    """Bytes of weight objects by where they came from: learner, relay."""


_GAUGES: dict[str, tuple[str, Callable[[Observed], float]]] = {
    "generation_tokens_per_second": ("Completion tokens over the last half minute", lambda o: o.tally.tokens_per_s),
    "policy_version_versions": (
        "Version that the engine generates with; -1 before the first",
        lambda o: o.policy_version,
    ),
    "learner_version_versions": ("The learner's newest version, as last heard", lambda o: o.learner_version),
    "leases_held_leases": ("Leases worked on, or spooled and not yet acknowledged", lambda o: o.leases),
    "spool_groups": ("Groups on disk that the learner has not acknowledged", lambda o: o.spool_groups),
    "spool_bytes": ("Their payload bytes", lambda o: o.spool_bytes),
    "spool_limit_bytes": ("Budget: at 80 % leasing stops, at 100 % generating", lambda o: o.spool_limit_bytes),
    "swap_pause_seconds": ("Pause of generation in the last swap of weights", lambda o: o.tally.swap_pause_s),
}
_COUNTERS: dict[str, tuple[str, Callable[[Observed], float]]] = {
    "generated_tokens": ("Completion tokens generated", lambda o: o.tally.tokens),
    "groups_generated": ("Groups generated", lambda o: o.tally.groups_generated),
    "groups_scored": ("Groups scored", lambda o: o.tally.groups_scored),
    "groups_spooled": ("Groups scored and durable in the spool", lambda o: o.tally.groups),
    "generation_seconds": ("Time that groups spent in the engine, summed over groups", lambda o: o.tally.generation_s),
    "scoring_seconds": ("Time that groups spent at the graders, summed over groups", lambda o: o.tally.scoring_s),
    "versions_loaded": ("Versions put into the engine", lambda o: o.tally.versions),
    "versions_refused": (
        "Versions that were sound as bytes and must not be loaded",
        lambda o: o.tally.versions_refused,
    ),
    "keyframes_refetched": (
        "Full weights fetched because deltas did not lead on",
        lambda o: o.tally.keyframes_refetched,
    ),
    "swap_seconds": ("Pauses of generation in swaps of weights, summed", lambda o: o.tally.swap_s),
    "weights_received_bytes": ("Bytes of weight objects received", lambda o: o.tally.weights_bytes),
    "weights_fetch_seconds": ("Time spent fetching weight objects", lambda o: o.tally.fetch_s),
    "relay_fallbacks": ("Times that the relay was set aside for the learner", lambda o: o.relay_fallbacks),
    "engine_restarts": ("Restarts of the engine", lambda o: o.engine_restarts),
    "grader_restarts": ("Restarts of the reward service", lambda o: o.tally.reward_restarts),
}
_LABELLED: dict[str, tuple[str, str, Callable[[Observed], Mapping[str, float]]]] = {
    "weights_source_bytes": ("Bytes of weight objects by where they came from", "source", lambda o: o.received_bytes),
    "groups_dropped": ("Groups given up here", "reason", lambda o: o.tally.dropped),
    "verdicts": ("The learner's verdicts on submitted groups", "code", lambda o: o.tally.verdicts),
    "idle_seconds": ("Time in which the engine had no work", "reason", lambda o: o.tally.idle.seconds()),
}


@dataclass(slots=True, kw_only=True)
class Vitals:
    """The parts that are observed; follower and rollout exist once the learner has answered."""

    tally: Tally
    spool: Spool
    session: LearnerSession
    engine: Engine
    weights: WeightSources
    follower: Follower | None = None
    rollout: Rollout | None = None

    def observe(self) -> Observed:
        return Observed(
            tally=self.tally,
            spool_groups=self.spool.groups,
            spool_bytes=self.spool.bytes,
            spool_limit_bytes=self.spool.max_bytes,
            leases=0 if self.rollout is None else len(self.rollout.lease_ids),
            policy_version=-1 if self.follower is None else self.follower.version,
            learner_version=self.session.learner_version,
            engine_restarts=self.engine.restarts,
            relay_fallbacks=self.weights.fallbacks,
            received_bytes={str(name): count for name, count in self.weights.received_bytes.items()},
        )


@contextmanager
def metrics_served(address: str, state_dir: Path, observe: Callable[[], Observed]) -> Generator[None]:
    """Serves on `address` while the block runs ("" serves nothing) and keeps what it got in state_dir/metrics_address.

    Called on the event loop. Raises as runtime.metrics.metrics_served."""
    collector = metrics.LoopCollector(lambda: metrics_of(observe()), asyncio.get_running_loop())
    file = state_dir / ADDRESS_NAME
    file.unlink(missing_ok=True)  # of a sampler that was killed
    with metrics.metrics_served(address, collector) as bound:
        if bound is not None:
            atomic_write(file, f"{bound}\n".encode())
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def metrics_of(observed: Observed) -> Iterator[Metric]:
    """Every metric; labelled ones have a sample for each label value that occurred."""
    for name, (text, read) in _GAUGES.items():
        yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=read(observed))
    for name, (text, count) in _COUNTERS.items():
        yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=count(observed))
    for name, (text, label, values) in _LABELLED.items():
        family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=(label,))
        for key, value in sorted(values(observed).items()):
            family.add_metric((key,), value)
        yield family

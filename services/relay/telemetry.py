"""Prometheus metrics of the relay: plain numbers of its parts, read at each scrape."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.relay.bodies import Bodies
from services.relay.disk_cache import DiskCache
from services.relay.plans import PlanMemory
from services.relay.upstream import Upstream
from services.relay.weight_service import RelayWeightService

_PREFIX = "heterorl_relay"


class RelayCollector(Collector):
    """What the cache saved is the ratio of served to fetched bytes."""

    def __init__(
        self, *, cache: DiskCache, upstream: Upstream, plans: PlanMemory, bodies: Bodies, service: RelayWeightService
    ) -> None:
        self._counters: dict[str, tuple[str, Callable[[], int]]] = {
            "fetched_bytes": ("Object bytes from upstream", lambda: upstream.bytes_fetched),
            "served_bytes": ("Object bytes to samplers", lambda: service.bytes_served),
            "hits": ("Objects served from disk", lambda: bodies.hits),
            "misses": ("Objects fetched from upstream", lambda: bodies.misses),
            "plans_remembered": ("Plans answered from memory", lambda: plans.answered_from_memory),
            "objects_damaged": ("Objects dropped for a wrong digest", lambda: cache.damaged),
            "objects_evicted": ("Objects removed for room", lambda: cache.evicted),
        }
        self._gauges: dict[str, tuple[str, Callable[[], int]]] = {
            "cache_bytes": ("Bytes on disk", lambda: cache.used_bytes),
            "upstream_connected_ratio": ("1 while announcements come in", lambda: int(upstream.connected)),
            "policy_version_versions": (
                "Newest announced version; -1 before the first",
                lambda: -1 if upstream.latest is None else upstream.latest.decoded.version,
            ),
        }

    def collect(self) -> Iterator[Metric]:
        for name, (text, count) in self._counters.items():
            yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=count())
        for name, (text, read) in self._gauges.items():
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=read())

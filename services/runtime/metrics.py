"""Prometheus metrics named `heterorl_<role>_<what>_<unit>`, in a registry of the process's own.

metrics = Metrics("sampler")
swap = metrics.histogram("swap", "seconds", "Time to swap weights", buckets=(0.1, 1, 10))
dropped = metrics.counter("groups_dropped", "Groups dropped", labels=("reason",))   # ..._groups_dropped_total
"""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from services.runtime.address import Address, parse_listen
from services.runtime.listening import listen_error

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
DEFAULT_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0, 300.0)
"""Seconds, from a local call to a keyframe on a slow link."""


class _Scrape(WSGIRequestHandler):
    """One connection, with a thread and a file of its own: one that says nothing is cut, or they would use up the files
    that the process may open, and end it."""

    timeout = 10.0
    """Seconds of silence."""

    def handle(self) -> None:
        with suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's word
        """Scrapes are no events of the log."""


class Metrics:
    """Makes the metrics of one process. `role` is learner, sampler, reward, relay or monitor."""

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        self._role = role

    def counter(self, what: str, text: str, unit: str = "", labels: Sequence[str] = ()) -> Counter:
        """Only grows. Prometheus adds `_total`. `text` says what is counted."""
        return Counter(self._name(what, unit), text, labels, registry=self.registry)

    def gauge(self, what: str, unit: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """Goes up and down. `unit`: seconds, bytes, ratio, tokens, versions, groups …"""
        return Gauge(self._name(what, unit), text, labels, registry=self.registry)

    def histogram(
        self,
        what: str,
        unit: str,
        text: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = DEFAULT_BUCKETS,
    ) -> Histogram:
        """A distribution; `buckets` are upper bounds in `unit`."""
        return Histogram(self._name(what, unit), text, labels, registry=self.registry, buckets=buckets)

    def _name(self, what: str, unit: str) -> str:
        name = "_".join(part for part in ("heterorl", self._role, what, unit) if part)
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a metric name: lower case words joined by underscores")
        return name

    @contextmanager
    def served(self, address: str) -> Generator[Address | None]:
        """Serves `/metrics` on HOST:PORT while the block runs, in a thread; port 0 takes a free one, "" serves nothing.

        Yields the address in use. Raises UsageError (not HOST:PORT), UnavailableError (port in use) or ConfigError
        (no such address on this machine, or a port that needs privileges).
        """
        if not address:
            yield None
            return
        wanted = parse_listen(address)
        try:
            server, thread = start_http_server(wanted.port, wanted.host, self.registry)
        except OSError as error:
            raise listen_error(wanted, "metrics", error) from error
        server.RequestHandlerClass = _Scrape
        try:
            yield Address(host=wanted.host, port=server.server_port)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

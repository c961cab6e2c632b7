"""Serves a process's Prometheus metrics. Each is named `heterorl_<role>_<what>_<unit>`; counters end in `_total`."""

import asyncio
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.registry import Collector

from services.runtime.address import Address, parse_listen
from services.runtime.listening import listen_error

_ANSWER_S = 5.0


class LoopCollector(Collector):
    """Calls `read` on `loop` at each scrape, so that all metrics are of one moment: scrapes come on other threads.

    A loop that does not answer within 5 s fails the scrape, which shows in the monitoring.
    """

    def __init__(self, read: Callable[[], Iterable[Metric]], loop: asyncio.AbstractEventLoop) -> None:
        self._read = read
        self._loop = loop

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not wait for the loop, on which it is called."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        async def now() -> list[Metric]:
            return list(self._read())

        return iter(asyncio.run_coroutine_threadsafe(now(), self._loop).result(_ANSWER_S))


class _Scrape(WSGIRequestHandler):
    """One connection, with a thread and a file descriptor of its own. A silent one is closed: such connections would
    use up the descriptors that the process may open."""

    timeout = 10.0
    """Seconds of silence."""

    def handle(self) -> None:
        with suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's word
        """Scrapes are no events of the log."""


@contextmanager
def metrics_served(address: str, collector: Collector) -> Generator[Address | None]:
    """Serves what `collector` gives as `/metrics` on HOST:PORT while the block runs; port 0 takes a free one, "" none.

    Yields the address in use. Raises UsageError (not HOST:PORT), UnavailableError (port in use) or ConfigError
    (no such address on this machine, or a port that needs privileges).
    """
    if not address:
        yield None
        return
    wanted = parse_listen(address)
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(wanted.port, wanted.host, registry)
    except OSError as error:
        raise listen_error(wanted, "metrics", error) from error
    server.RequestHandlerClass = _Scrape
    try:
        yield Address(host=wanted.host, port=server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""An emulated wide-area link: a TCP proxy with delay, jitter, rate, loss and faults, for kernels without netem.

    client ──► read ─ pace by rate ─► [(due, bytes) …] ─ wait until due ─► write ──► upstream      (and the same back)

Bytes wait with due times instead of one after the other, so a long delay costs no throughput: up to rate × delay is in
flight. All connections of a link share its rate, one rate per direction. What is buffered is bounded: a reader waits
while the link's queue is longer than `queue_s`, or while the other end does not read.

TCP is emulated as its users see it: a new connection costs a round trip, a lost packet is a stall of its connection
(a retransmission, with all later bytes behind it), a cut holds bytes back until it heals, a reset is a real RST. What
is not emulated: slow start and the rate that TCP gives up after a loss.

As a process: `python -m services.lab.wan --listen 127.0.0.1:0 --upstream HOST:PORT --rtt-ms 150 --rate-mbit 30` prints
one JSON line with the bound port. With `--control` it obeys lines on stdin (cut, heal, reset, stats), a JSON line each.
"""

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Self

from services.runtime import lifecycle
from services.runtime.address import Address, parse_listen, parse_target
from services.runtime.errors import ConfigError, HeteroRLError, UnavailableError

_CHUNK_BYTES = 16 * 1024
_PACKET_BYTES = 1460
_SOCKET_BUFFER_BYTES = 128 * 1024
"""Small, or the kernels of both ends would take megabytes that the link has not carried yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """What a link does to bytes, the same in both directions. Raises ConfigError for values that no link has."""

    delay_s: float = 0.0
    """One way, seconds."""
    jitter_s: float = 0.0
    """Each chunk of up to 16 KiB takes up to this much longer (uniform); order within a connection is kept."""
    rate_bit_s: float = 100e6
    loss: float = 0.0
    """Chance of a 1,460-byte packet to be lost: its connection then stalls for a round trip, at least 20 ms."""
    queue_s: float = 0.05
    """Seconds of traffic at full rate that may queue before the link stops reading."""

    def __post_init__(self) -> None:
        if min(self.delay_s, self.jitter_s) < 0 or self.rate_bit_s <= 0 or self.queue_s <= 0:
            raise ConfigError("a link needs delay and jitter of 0 or more, and a rate and queue above 0.")
        if not 0 <= self.loss < 1:
            raise ConfigError(f"loss is the chance of a packet to be lost, 0 to below 1, not {self.loss}.")

    @property
    def stall_s(self) -> float:
        return max(0.02, 2 * self.delay_s)


@dataclass(slots=True, kw_only=True)
class LinkCounters:
    """What a link has carried since it was opened."""

    bytes_up: int = 0
    """Delivered from clients to the upstream."""
    bytes_down: int = 0
    connections: int = 0
    refused: int = 0
    """Connections reset because the upstream did not accept them."""
    stalls: int = 0


@dataclass(slots=True, kw_only=True)
class _Direction:
    """The wire one way, shared by all connections: when it has sent what it accepted, and what has arrived."""

    free_at: float = 0.0
    delivered_bytes: int = 0


class WanLink:
    """`async with WanLink(listen, upstream, profile) as link:` proxies until the block ends.

    Raises UnavailableError when `listen` cannot be bound. The same `seed` draws the same jitter and losses for the
    same sequence of chunks.
    """

    def __init__(self, listen: Address, upstream: Address, profile: LinkProfile, *, seed: int = 0) -> None:
        self.profile = profile
        """May be replaced at any time; bytes already under way keep their due times."""
        self._listen = listen
        self._upstream = upstream
        self._random = random.Random(seed)
        self._up = _Direction()
        self._down = _Direction()
        self._connected = asyncio.Event()
        self._connected.set()
        self._counters = LinkCounters()
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    async def __aenter__(self) -> Self:
        try:
            listening = socket.create_server(
                (self._listen.host, self._listen.port),
                family=socket.AF_INET6 if ":" in self._listen.host else socket.AF_INET,
            )
        except OSError as error:
            raise UnavailableError(f"cannot listen on {self._listen}: {error.strerror}.") from error
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)  # accepted sockets inherit it
        self._server = await asyncio.start_server(self._accept, sock=listening, limit=_CHUNK_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        await asyncio.gather(*self._open, return_exceptions=True)

    @property
    def address(self) -> Address:
        """Where it listens, with the real port."""
        assert self._server is not None
        return Address(host=self._listen.host, port=self._server.sockets[0].getsockname()[1])

    @property
    def counters(self) -> LinkCounters:
        self._counters.bytes_up = self._up.delivered_bytes
        self._counters.bytes_down = self._down.delivered_bytes
        return self._counters

    def cut(self) -> None:
        """A black hole: nothing arrives any more, no one is told. New connections hang, as a lost SYN does."""
        self._connected.clear()

    def heal(self) -> None:
        """Ends a cut: what was held back arrives now, as TCP's retransmissions would bring it."""
        self._connected.set()

    def reset(self) -> None:
        """Ends every open connection with a RST at both ends. New ones are accepted."""
        for task, writers in self._open.items():
            for writer in writers:
                _abort(writer)
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = [writer]
        self._counters.connections += 1
        end = _abort
        try:
            await self._carry(reader, writer, self._open[task])
            end = asyncio.StreamWriter.close  # both directions have ended: what is still to be sent is sent
        except* (OSError, asyncio.CancelledError):
            pass  # one end failed, or reset(): both ends learn of it by a RST
        for each in self._open.pop(task):
            end(each)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, writers: list[asyncio.StreamWriter]
    ) -> None:
        """*consumes* one client connection; *ends* when both directions ended or one failed."""
        await asyncio.sleep(2 * self.profile.delay_s)  # the handshake
        await self._connected.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection(
                self._upstream.host, self._upstream.port, limit=_CHUNK_BYTES
            )
        except OSError:
            self._counters.refused += 1
            raise
        writers.append(far_writer)
        for each in writers:
            _tune(each)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._carry_one_way(self._up, reader, far_writer))
            tasks.create_task(self._carry_one_way(self._down, far_reader, writer))

    async def _carry_one_way(
        self, wire: _Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        flight = _Flight()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._depart(wire, reader, flight))
            tasks.create_task(self._arrive(wire, writer, flight))

    async def _depart(self, wire: _Direction, reader: asyncio.StreamReader, flight: "_Flight") -> None:
        """*waits for* room on the wire and in flight; *produces* chunks with due times, an empty one for EOF."""
        clock = asyncio.get_running_loop().time
        due = 0.0
        while True:
            profile = self.profile
            await asyncio.sleep(max(0.0, wire.free_at - clock() - profile.queue_s))
            # One delay and one queue at full rate: with more, the other end does not read, and so do we not.
            in_flight_s = profile.delay_s + profile.jitter_s + profile.stall_s + 2 * profile.queue_s
            await flight.room(int(profile.rate_bit_s / 8 * in_flight_s) + _CHUNK_BYTES)
            data = await reader.read(_CHUNK_BYTES)
            wire.free_at = max(clock(), wire.free_at) + len(data) * 8 / profile.rate_bit_s
            late_s = self._random.uniform(0.0, profile.jitter_s)
            if self._random.random() > (1 - profile.loss) ** -(-len(data) // _PACKET_BYTES):
                self._counters.stalls += 1
                late_s += profile.stall_s
            due = max(due, wire.free_at + profile.delay_s + late_s)
            flight.push(due, data)
            if not data:
                return

    async def _arrive(self, wire: _Direction, writer: asyncio.StreamWriter, flight: "_Flight") -> None:
        """*waits for* due times and for an unbroken link; *produces* the bytes at the other end."""
        clock = asyncio.get_running_loop().time
        while True:
            due, data = await flight.next()
            await asyncio.sleep(max(0.0, due - clock()))
            await self._connected.wait()
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
            flight.landed(len(data))
            wire.delivered_bytes += len(data)


@dataclass(slots=True)
class _Flight:
    """Chunks of one connection under way in one direction, oldest first."""

    _chunks: deque[tuple[float, bytes]] = field(default_factory=deque[tuple[float, bytes]])
    _bytes: int = 0
    _pushed: asyncio.Event = field(default_factory=asyncio.Event)
    _left: asyncio.Event = field(default_factory=asyncio.Event)

    async def room(self, limit_bytes: int) -> None:
        while self._bytes >= limit_bytes:
            self._left.clear()
            await self._left.wait()

    def push(self, due: float, data: bytes) -> None:
        self._chunks.append((due, data))
        self._bytes += len(data)
        self._pushed.set()

    async def next(self) -> tuple[float, bytes]:
        while not self._chunks:
            self._pushed.clear()
            await self._pushed.wait()
        return self._chunks.popleft()

    def landed(self, count: int) -> None:
        self._bytes -= count
        self._left.set()


def _tune(writer: asyncio.StreamWriter) -> None:
    writer.transport.set_write_buffer_limits(high=_SOCKET_BUFFER_BYTES)
    endpoint: socket.socket = writer.get_extra_info("socket")
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
    endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Closes at once; the peer gets a RST unless both directions had already ended."""
    endpoint: socket.socket = writer.get_extra_info("socket")
    if endpoint.fileno() >= 0:
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _serve(process: lifecycle.Process, arguments: argparse.Namespace) -> None:
    profile = LinkProfile(
        delay_s=arguments.rtt_ms / 2000,
        jitter_s=arguments.jitter_ms / 1000,
        rate_bit_s=arguments.rate_mbit * 1e6,
        loss=arguments.loss,
    )
    listen, upstream = parse_listen(arguments.listen), parse_target(arguments.upstream)
    async with WanLink(listen, upstream, profile, seed=arguments.seed) as link:
        print(json.dumps({"listen": str(link.address), "port": link.address.port}), flush=True)
        process.ready(f"carrying to {upstream}")
        control = process.tasks.create_task(_obey(link)) if arguments.control else None
        await process.drain.wait()
        if control is not None:
            control.cancel()


async def _obey(link: WanLink) -> None:
    """*consumes* lines of stdin until it ends; *produces* the counters after each command."""
    commands = {"cut": link.cut, "heal": link.heal, "reset": link.reset, "stats": lambda: None}
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        command = commands.get(line.decode(errors="replace").strip())
        if command is None:
            print(json.dumps({"error": f"say one of {', '.join(commands)}"}), flush=True)
            continue
        command()
        print(json.dumps(asdict(link.counters)), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a link until SIGTERM or SIGINT. Exit codes as everywhere: 0, 2, 69, 78."""
    parser = argparse.ArgumentParser(prog="services.lab.wan", description="An emulated wide-area TCP link.")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="port 0 takes a free one")
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt-ms", type=float, default=0.0, help="round trip; half of it each way")
    parser.add_argument("--rate-mbit", type=float, default=100.0, help="Mbit/s in each direction")
    parser.add_argument("--jitter-ms", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0, help="chance of a packet to be lost, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", action="store_true", help="obey cut, heal, reset, stats on stdin")
    arguments = parser.parse_args(argv)
    try:
        return lifecycle.run(lambda process: _serve(process, arguments), "wan")
    except HeteroRLError as error:
        print(f"wan: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

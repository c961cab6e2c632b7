"""The emulated link against real sockets: its delay, rate, bounds and faults are measured."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator

import pytest

from services.lab.wan import LinkProfile, WanLink
from services.runtime.address import Address
from services.runtime.errors import ConfigError, UnavailableError

_ANY_PORT = Address(host="127.0.0.1", port=0)
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def upstream(*, echoes: bool = True) -> AsyncIterator[tuple[Address, asyncio.Queue[Streams]]]:
    """A server that echoes all it gets, or leaves its connections to the test."""
    accepted: asyncio.Queue[Streams] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait((reader, writer))
        if not echoes:
            return
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1]), accepted
    finally:
        server.close()
        while not accepted.empty():
            accepted.get_nowait()[1].close()


@contextlib.asynccontextmanager
async def connected(link: WanLink) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(link.address.host, link.address.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def round_trip_s(streams: Streams) -> float:
    reader, writer = streams
    began = time.monotonic()
    writer.write(b"ping")
    assert await reader.readexactly(4) == b"ping"
    return time.monotonic() - began


async def test_a_round_trip_takes_the_set_time_and_a_new_connection_one_more() -> None:
    async with (
        upstream() as (target, _),
        WanLink(_ANY_PORT, target, LinkProfile(delay_s=0.06)) as link,
        connected(link) as streams,
    ):
        first = await round_trip_s(streams)
        warm = min([await round_trip_s(streams) for _ in range(4)])
    assert 0.12 <= warm < 0.16
    assert 0.24 <= first < 0.40


async def test_throughput_reaches_the_rate_over_a_long_delay() -> None:
    """Stop-and-wait of 16 KiB chunks would reach 0.8 Mbit/s here."""
    rate_bit_s, sent = 40e6, 4_000_000
    profile = LinkProfile(delay_s=0.08, rate_bit_s=rate_bit_s)
    async with upstream(echoes=False) as (target, accepted), WanLink(_ANY_PORT, target, profile) as link:
        async with connected(link) as (_, writer):
            writer.write(b"x")
            reader, _far = await accepted.get()
            await reader.readexactly(1)
            writer.write(bytes(sent))
            await reader.readexactly(1_000_000)
            began = time.monotonic()
            await reader.readexactly(sent - 1_000_000)
            measured = (sent - 1_000_000) * 8 / (time.monotonic() - began)
        assert link.counters.bytes_up == sent + 1
    assert measured == pytest.approx(rate_bit_s, rel=0.15)


async def test_connections_share_the_rate_and_directions_do_not() -> None:
    size = 500_000
    async with (
        upstream() as (target, _),
        WanLink(_ANY_PORT, target, LinkProfile(rate_bit_s=16e6)) as link,
        connected(link) as one,
        connected(link) as two,
    ):
        began = time.monotonic()
        for _, writer in (one, two):
            writer.write(bytes(size))
        await asyncio.gather(one[0].readexactly(size), two[0].readexactly(size))
        took = time.monotonic() - began
    # Both megabytes pass each direction once, at the same time: 0.5 s, not 0.25 (own rates) nor 1.0 (one for both).
    assert took == pytest.approx(0.5, rel=0.2)


async def test_bytes_arrive_unchanged_and_in_order_under_jitter_and_loss() -> None:
    profile = LinkProfile(delay_s=0.005, jitter_s=0.02, loss=0.01, rate_bit_s=200e6)
    sent = os.urandom(1_000_000)
    async with upstream() as (target, _), WanLink(_ANY_PORT, target, profile, seed=3) as link:
        async with connected(link) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            assert await reader.read(-1) == sent
        assert link.counters.stalls > 0
        assert (link.counters.bytes_up, link.counters.bytes_down) == (len(sent), len(sent))


async def test_a_reader_that_stops_stops_the_sender() -> None:
    """20 MB meet a far end that reads nothing: the link buffers its bound, and the sender feels it."""
    profile = LinkProfile(delay_s=0.01, rate_bit_s=200e6)
    async with (
        upstream(echoes=False) as (target, accepted),
        WanLink(_ANY_PORT, target, profile) as link,
        connected(link) as (_, writer),
    ):
        writer.write(bytes(20_000_000))
        _reader, far = await accepted.get()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 1.5)
        assert link.counters.bytes_up < 10_000_000
        far.transport.abort()


async def test_a_cut_holds_bytes_back_and_healing_delivers_them() -> None:
    async with (
        upstream() as (target, _),
        WanLink(_ANY_PORT, target, LinkProfile(delay_s=0.01)) as link,
        connected(link) as streams,
    ):
        await round_trip_s(streams)
        link.cut()
        streams[1].write(b"held")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(streams[0].readexactly(1), 0.3)
        link.heal()
        assert await asyncio.wait_for(streams[0].readexactly(4), 2) == b"held"


async def test_a_connection_made_during_a_cut_works_after_it() -> None:
    async with upstream() as (target, accepted), WanLink(_ANY_PORT, target, LinkProfile()) as link:
        link.cut()
        async with connected(link) as streams:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(accepted.get(), 0.2)
            link.heal()
            assert await asyncio.wait_for(round_trip_s(streams), 2) < 2


async def test_a_reset_reaches_both_ends_and_new_connections_work() -> None:
    async with upstream(echoes=False) as (target, accepted), WanLink(_ANY_PORT, target, LinkProfile()) as link:
        async with connected(link) as (reader, writer):
            writer.write(b"x")
            far_reader, _far = await accepted.get()
            await far_reader.readexactly(1)
            link.reset()
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(1), 2)
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(far_reader.read(1), 2)
        async with connected(link) as (_, writer):
            writer.write(b"y")
            far_reader, _far = await asyncio.wait_for(accepted.get(), 2)
            assert await far_reader.readexactly(1) == b"y"
        assert link.counters.connections == 2


async def test_an_end_of_stream_passes_one_way_only() -> None:
    async with (
        upstream(echoes=False) as (target, accepted),
        WanLink(_ANY_PORT, target, LinkProfile()) as link,
        connected(link) as (reader, writer),
    ):
        writer.write(b"question")
        writer.write_eof()
        far_reader, far = await accepted.get()
        assert await far_reader.read(-1) == b"question"
        far.write(b"answer")
        far.close()
        assert await reader.read(-1) == b"answer"


async def test_a_client_is_reset_when_the_upstream_does_not_listen() -> None:
    async with upstream() as (target, _):
        pass
    async with WanLink(_ANY_PORT, target, LinkProfile()) as link:
        async with connected(link) as (reader, _writer):
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(1), 2)
        assert link.counters.refused == 1


async def test_a_port_in_use_and_an_impossible_profile_are_refused() -> None:
    async with upstream() as (target, _):
        with pytest.raises(UnavailableError, match="cannot listen"):
            async with WanLink(target, target, LinkProfile()):
                pass
    with pytest.raises(ConfigError, match="rate"):
        LinkProfile(rate_bit_s=0)
    with pytest.raises(ConfigError, match="loss"):
        LinkProfile(loss=1)


async def test_the_process_prints_its_port_obeys_stdin_and_ends_on_sigterm() -> None:
    async with upstream() as (target, _):
        arguments = ["--listen", "127.0.0.1:0", "--upstream", str(target), "--rtt-ms", "20", "--control"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.lab.wan", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        port = json.loads(await process.stdout.readline())["port"]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await round_trip_s((reader, writer)) >= 0.04
        process.stdin.write(b"stats\n")
        assert json.loads(await process.stdout.readline())["bytes_down"] == 4
        process.stdin.write(b"flood\n")
        assert "cut" in json.loads(await process.stdout.readline())["error"]
        process.stdin.write(b"reset\n")
        assert json.loads(await process.stdout.readline())["connections"] == 1
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_wrong_upstream_ends_the_process_with_one_sentence() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.lab.wan", "--listen", "127.0.0.1:0", "--upstream", "nowhere"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert stderr.decode().strip().splitlines()[-1].startswith("wan: 'nowhere' is not HOST:PORT")

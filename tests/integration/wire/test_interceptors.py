"""Errors and access as a client sees them, for every kind of method, on a real server."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import grpc
import pytest

from services.lab.wan import LinkProfile, WanLink
from services.runtime.errors import ExhaustedError, FencedError, HeteroRLError, MismatchError, RefusedError
from services.runtime.log import JsonLines
from services.wire import interceptors
from services.wire.channel import open_channel
from services.wire.errors import from_rpc_error
from services.wire.identity import Identity, Role
from tests.integration.wire.echo_service import (
    BOTH,
    CLIENT_STREAM,
    LOOPBACK,
    SERVER_STREAM,
    UNARY,
    UNLISTED,
    WHO,
    WRITTEN,
    Echo,
    serving,
)

SAMPLER = Identity(role=Role.SAMPLER, id="eu-2")
KINDS = [UNARY, SERVER_STREAM, CLIENT_STREAM, BOTH, WRITTEN]


async def call(channel: grpc.aio.Channel, method: str, request: bytes = b"x") -> list[bytes]:
    """Every answer of one call; raises our error for its status."""

    async def requests() -> AsyncIterator[bytes]:
        yield request

    try:
        if method in (SERVER_STREAM, WRITTEN):
            return [answer async for answer in channel.unary_stream(method)(request, timeout=20)]
        if method == CLIENT_STREAM:
            return [await channel.stream_unary(method)(requests(), timeout=20)]
        if method == BOTH:
            return [answer async for answer in channel.stream_stream(method)(requests(), timeout=20)]
        return [await channel.unary_unary(method)(request, timeout=20)]
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def read_all(stream: grpc.aio.UnaryStreamCall[bytes, bytes]) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def call_insecurely(echo: Echo, method: str, identity: Identity | None = SAMPLER, **access) -> list[bytes]:
    async with serving(echo, **access) as address, open_channel(address, None, "control", identity) as channel:
        return await call(channel, method)


@pytest.mark.parametrize("method", KINDS)
async def test_an_allowed_call_of_every_kind_passes_unchanged(method: str):
    assert set(await call_insecurely(Echo(), method)) == {b"x"}


@pytest.mark.parametrize("method", KINDS)
async def test_an_error_of_ours_arrives_as_the_same_class_with_its_retry_time(method: str):
    def act(_: bytes) -> None:
        raise ExhaustedError("the queue is full: try again", retry_after_s=2.5)

    with pytest.raises(ExhaustedError, match="the queue is full: try again") as caught:
        await call_insecurely(Echo(act), method)
    assert caught.value.retry_after_s == 2.5


@pytest.mark.parametrize("method", KINDS)
async def test_text_of_an_uncaught_exception_stays_in_the_log_under_the_id_that_the_client_gets(
    method: str, caplog: pytest.LogCaptureFixture
):
    def act(_: bytes) -> None:
        raise KeyError("hunter2")

    with caplog.at_level(logging.INFO, "heterorl"), pytest.raises(HeteroRLError) as caught:
        await call_insecurely(Echo(act), method)
    assert type(caught.value) is HeteroRLError
    assert "hunter2" not in str(caught.value)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.startswith("heterorl")]
    logged = [line for line in lines if line["event"] == "internal_error"]
    assert len(logged) == 1
    assert logged[0]["error_id"] in str(caught.value)
    assert logged[0]["method"] == method
    assert "hunter2" in logged[0]["traceback"]


async def test_an_error_inside_an_exception_group_is_found():
    def act(_: bytes) -> None:
        raise ExceptionGroup("tasks", [FencedError("session 3 was replaced by session 4: end this process")])

    with pytest.raises(FencedError, match="replaced by session 4"):
        await call_insecurely(Echo(act), UNARY)


@pytest.mark.parametrize("method", KINDS)
async def test_a_role_that_is_not_listed_is_refused_for_every_kind(method: str):
    with pytest.raises(RefusedError, match=f"monitor m may not call {method}"):
        await call_insecurely(Echo(), method, Identity(role=Role.MONITOR, id="m"))


async def test_a_method_without_a_list_is_refused_to_everyone():
    for role in Role:
        with pytest.raises(RefusedError):
            await call_insecurely(Echo(), UNLISTED, Identity(role=role, id="x"))


async def test_a_method_that_nobody_serves_is_a_mismatch_of_protocols():
    with pytest.raises(MismatchError, match="UNIMPLEMENTED"):
        await call_insecurely(Echo(), "/test.Echo/Absent")


async def test_an_identity_on_the_deny_list_is_refused_in_an_allowed_role():
    with pytest.raises(RefusedError, match="sampler eu-2 is on the deny-list"):
        await call_insecurely(Echo(), UNARY, is_denied=lambda identity: identity.id == "eu-2")


async def test_an_identity_may_have_so_many_calls_open_and_takes_none_from_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interceptors, "MOST_CALLS", 3)
    other = Identity(role=Role.SAMPLER, id="us-1")
    echo = Echo()
    async with (
        serving(echo) as address,
        open_channel(address, None, "bulk", SAMPLER) as channel,
        open_channel(address, None, "bulk", other) as beside,
    ):
        streams = [channel.unary_stream(SERVER_STREAM)(b"endless") for _ in range(3)]
        for stream in streams:
            assert await stream.read() == b"endless"
        with pytest.raises(ExhaustedError, match="sampler eu-2 has 3 calls open"):
            await call(channel, UNARY)
        assert await call(beside, UNARY) == [b"x"]
        streams[0].cancel()
        async with asyncio.timeout(10):
            await echo.closed.wait()
        assert await call(channel, UNARY) == [b"x"]


async def test_each_refusal_is_one_log_line_whoever_refuses(caplog: pytest.LogCaptureFixture):
    def act(_: bytes) -> None:
        raise RefusedError("the certificate is for sampler eu-2, and the message says it is from 'us-1'")

    for method in (UNARY, UNLISTED):
        with caplog.at_level(logging.INFO, "heterorl"), pytest.raises(RefusedError):
            await call_insecurely(Echo(act), method)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.startswith("heterorl")]
    assert [(line["event"], line["method"]) for line in lines] == [
        ("access_denied", UNARY),
        ("access_denied", UNLISTED),
    ]
    assert all("sampler eu-2" in line["reason"] for line in lines)


async def test_without_tls_the_client_is_who_it_says_and_a_monitor_if_it_says_nothing():
    assert await call_insecurely(Echo(), WHO, SAMPLER) == [b"sampler eu-2"]
    assert await call_insecurely(Echo(), WHO, None) == [b"monitor local"]


async def test_a_client_that_leaves_runs_the_handlers_clean_up_and_logs_no_fault(caplog: pytest.LogCaptureFixture):
    echo = Echo()
    async with serving(echo) as address, open_channel(address, None, "bulk", SAMPLER) as channel:
        stream = channel.unary_stream(SERVER_STREAM)(b"endless")
        assert await stream.read() == b"endless"
        stream.cancel()
        async with asyncio.timeout(10):
            await echo.closed.wait()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_links_that_break_while_an_answer_is_written_are_no_fault_of_the_server(
    caplog: pytest.LogCaptureFixture,
):
    """One write in twenty fails before gRPC says that its peer has gone."""
    async with serving(Echo()) as address, WanLink(LOOPBACK, address, LinkProfile(rate_bit_s=1e9)) as link:
        for _ in range(15):
            async with open_channel(link.address, None, "bulk", SAMPLER) as channel:
                streams = [channel.unary_stream(WRITTEN)(b"endless") for _ in range(10)]
                for stream in streams:
                    assert await stream.read() == b"endless"
                link.reset()
                for stream in streams:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await read_all(stream)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []

"""Channels and servers with their real settings, on loopback."""

import asyncio
import os
import resource
import stat
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from services.runtime.address import Address
from services.runtime.errors import BadInputError, ConfigError, RefusedError, UnavailableError, UsageError
from services.wire.channel import MESSAGE_BYTES, open_channel
from services.wire.errors import from_rpc_error
from services.wire.identity import Identity, Role
from services.wire.interceptors import server_interceptors
from services.wire.server import bind, bind_unix, build_server
from tests.integration.wire.echo_service import LOOPBACK, RULES, UNARY, Echo, serving

SAMPLER = Identity(role=Role.SAMPLER, id="s")


async def test_a_call_made_before_the_learner_is_there_waits_for_it():
    server = build_server("learner", server_interceptors(RULES))
    server.add_generic_rpc_handlers((Echo().handler(),))
    address = bind(server, LOOPBACK, None)
    async with open_channel(address, None, "control", SAMPLER) as channel:
        waiting = asyncio.ensure_future(channel.unary_unary(UNARY)(b"x", timeout=30))
        await server.start()
        assert await waiting == b"x"
    await server.stop(0)


async def test_a_learner_that_stays_away_is_unavailable_after_the_calls_timeout():
    server = build_server("learner", [])
    address = bind(server, LOOPBACK, None)
    await server.stop(0)
    async with open_channel(address, None, "control", SAMPLER) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(UNARY)(b"x", timeout=0.3)
    assert type(from_rpc_error(caught.value)) is UnavailableError


async def test_a_unary_call_is_tried_again_while_the_server_is_unavailable():
    attempts: list[bytes] = []

    def act(request: bytes) -> None:
        attempts.append(request)
        if len(attempts) < 3:
            raise UnavailableError("starting: try again")

    async with serving(Echo(act)) as address, open_channel(address, None, "control", SAMPLER) as channel:
        assert await channel.unary_unary(UNARY)(b"x", timeout=30) == b"x"
    assert len(attempts) == 3


async def test_a_server_takes_as_many_connections_as_it_was_told():
    server = build_server("learner", server_interceptors(RULES), max_connections=2)
    server.add_generic_rpc_handlers((Echo().handler(),))
    address = bind(server, LOOPBACK, None)
    await server.start()
    async with AsyncExitStack() as stack:
        first, second, third = [
            await stack.enter_async_context(open_channel(address, None, "control", SAMPLER)) for _ in range(3)
        ]
        for channel in (first, second):
            assert await channel.unary_unary(UNARY)(b"x", timeout=30) == b"x"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await third.unary_unary(UNARY)(b"x", timeout=30, wait_for_ready=False)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await first.close()
        assert await third.unary_unary(UNARY)(b"x", timeout=30) == b"x"
    await server.stop(0)


async def test_more_connections_than_files_raise_the_soft_limit_or_are_refused_at_the_hard_one():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] - 2, limits[1]))
        build_server("learner", [], max_connections=limits[1] - 257)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[1] - 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(ConfigError, match=r"listen\.max_connections .* needs .* open files, and this process may open"):
        build_server("learner", [], max_connections=limits[1])


async def test_control_and_bulk_channels_of_one_process_use_connections_of_their_own():
    peers: set[str] = set()

    class Peers(Echo):
        async def unary(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            peers.add(context.peer())
            return request

    async with (
        serving(Peers()) as address,
        open_channel(address, None, "control", SAMPLER) as control,
        open_channel(address, None, "bulk", SAMPLER) as bulk,
        open_channel(address, None, "bulk", SAMPLER) as second_bulk,
    ):
        for channel in (control, bulk, second_bulk, control):
            await channel.unary_unary(UNARY)(b"x", timeout=20)
    assert len(peers) == 3


async def test_a_message_over_the_limit_is_bad_input_on_either_side():
    async with serving(Echo()) as address, open_channel(address, None, "bulk", SAMPLER) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(UNARY)(bytes(MESSAGE_BYTES + 1), timeout=20)
        assert isinstance(from_rpc_error(caught.value), BadInputError)
        options = [("grpc.max_send_message_length", -1), ("grpc.primary_user_agent", SAMPLER.uri)]
        async with grpc.aio.insecure_channel(str(address), options=options) as careless:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await careless.unary_unary(UNARY)(bytes(MESSAGE_BYTES + 1), timeout=20)
        assert isinstance(from_rpc_error(caught.value), BadInputError)


async def test_a_compressed_message_is_refused():
    async with serving(Echo()) as address:
        gzip = grpc.Compression.Gzip
        options = [("grpc.primary_user_agent", SAMPLER.uri)]
        async with grpc.aio.insecure_channel(str(address), options=options, compression=gzip) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(UNARY)(bytes(1 << 20), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_in_use_is_one_sentence():
    async with serving(Echo()) as address:
        with pytest.raises(UnavailableError, match=rf"port {address.port} on 127.0.0.1 \(gRPC\) is in use"):
            bind(build_server("learner", []), address, None)


async def test_an_address_of_another_machine_is_a_config_error():
    credentials = grpc.insecure_server_credentials()
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        bind(build_server("learner", []), Address(host="192.0.2.1", port=0), credentials)
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid:0"):
        bind(build_server("learner", []), Address(host="no.such.host.invalid", port=0), credentials)


async def test_without_tls_only_loopback_is_served_and_dialed():
    with pytest.raises(RefusedError, match=r"0\.0\.0\.0:0 is not one: use TLS"):
        bind(build_server("learner", []), Address(host="0.0.0.0", port=0), None)
    with pytest.raises(RefusedError, match=r"learner\.example\.org:7443 is not one"):
        open_channel(Address(host="learner.example.org", port=7443), None, "control")
    with pytest.raises(UsageError, match="is not unix:///path"):
        open_channel("learner.example.org:7443", None, "control")


async def test_a_unix_socket_is_private_replaces_a_dead_one_and_refuses_a_live_one(tmp_path: Path):
    path = tmp_path / "reward.sock"
    for _ in range(2):  # the second server finds the first one's socket file
        server = build_server("reward", server_interceptors(RULES))
        server.add_generic_rpc_handlers((Echo().handler(),))
        target = bind_unix(server, path)
        await server.start()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        async with open_channel(target, None, "control", SAMPLER) as channel:
            assert await channel.unary_unary(UNARY)(b"x", timeout=20) == b"x"
        with pytest.raises(UnavailableError, match="is in use by another process"):
            bind_unix(build_server("reward", []), path)
        path.rename(tmp_path / "aside")  # gRPC removes the file of a server that stops; a crash does not
        await server.stop(0)
        (tmp_path / "aside").rename(path)


async def test_a_socket_that_cannot_be_looked_at_is_one_sentence(tmp_path: Path):
    with pytest.raises(UnavailableError, match=r"cannot listen on socket .*: File name too long"):
        bind_unix(build_server("reward", []), tmp_path / ("x" * 300))

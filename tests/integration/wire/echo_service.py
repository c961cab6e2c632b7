"""A small service with one method of each kind, for tests of what surrounds a handler."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc

from services.runtime.address import Address
from services.wire.identity import Role
from services.wire.interceptors import AccessRules, peer_identity, server_interceptors
from services.wire.server import bind, build_server

LOOPBACK = Address(host="127.0.0.1", port=0)
SERVICE = "test.Echo"
UNARY, SERVER_STREAM, CLIENT_STREAM, BOTH, WRITTEN, WHO, UNLISTED = (
    f"/{SERVICE}/{name}" for name in ("Unary", "ServerStream", "ClientStream", "Both", "Written", "Who", "Unlisted")
)
SAMPLERS = frozenset({Role.SAMPLER})
RULES: AccessRules = {
    UNARY: SAMPLERS,
    SERVER_STREAM: SAMPLERS,
    CLIENT_STREAM: SAMPLERS,
    BOTH: SAMPLERS,
    WRITTEN: SAMPLERS,
    WHO: frozenset(Role),
}


class Echo:
    """Each method calls `act` with the request first: a test lets it raise or wait."""

    def __init__(self, act: Callable[[bytes], object] = lambda _: None) -> None:
        self.act = act
        self.closed = asyncio.Event()
        """Set when a generator handler's clean-up has run."""

    async def unary(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self.act(request)
        return request

    async def who(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return str(peer_identity(context)).encode()

    async def server_stream(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        try:
            yield request
            self.act(request)
            if request == b"endless":
                await asyncio.Event().wait()
            yield request
        finally:
            self.closed.set()

    async def client_stream(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        parts = [request async for request in requests]
        self.act(parts[-1])
        return b"".join(parts)

    async def both(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for request in requests:
            self.act(request)
            yield request

    async def written(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        await context.write(request)
        self.act(request)
        while request == b"endless":
            await context.write(bytes(64 << 10))
        await context.write(request)

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
                "Unlisted": grpc.unary_unary_rpc_method_handler(self.unary),
                "Who": grpc.unary_unary_rpc_method_handler(self.who),
                "ServerStream": grpc.unary_stream_rpc_method_handler(self.server_stream),
                "ClientStream": grpc.stream_unary_rpc_method_handler(self.client_stream),
                "Both": grpc.stream_stream_rpc_method_handler(self.both),
                "Written": grpc.unary_stream_rpc_method_handler(self.written),
            },
        )


@asynccontextmanager
async def serving(
    echo: Echo, credentials: grpc.ServerCredentials | None = None, rules: AccessRules = RULES, **access
) -> AsyncIterator[Address]:
    server = build_server("learner", server_interceptors(rules, **access))
    server.add_generic_rpc_handlers((echo.handler(),))
    address = bind(server, LOOPBACK, credentials)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)

"""The gRPC health service of the sampler, on a Unix socket: for a container's probe and for `heterorl health`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer  # what health.aio is; type checkers do not see that name

from services.wire.server import bind_unix, build_server


class Health:
    """What the service answers."""

    def __init__(self, servicer: HealthServicer) -> None:
        self._servicer = servicer

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._servicer.set("", status)


@asynccontextmanager
async def serve_health(path: Path) -> AsyncGenerator[Health]:
    """Serves NOT_SERVING until told otherwise. Raises UnavailableError when the socket cannot be bound."""
    server = build_server("reward", ())
    servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bind_unix(server, path)
    told = Health(servicer)
    await told.set_serving(False)
    await server.start()
    try:
        yield told
    finally:
        await server.stop(0)

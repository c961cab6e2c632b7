"""The standard gRPC health check, from the client's side."""

from grpc_health.v1 import health_pb2

from services.monitor.client import answer_to
from services.runtime.address import parse_target
from services.wire.channel import open_channel
from services.wire.credentials import channel_credentials
from services.wire.tls import TlsFiles


async def is_serving(address: str, tls: TlsFiles | None, timeout_s: float = 5.0) -> bool:
    """address: HOST:PORT or unix:///path. Raises UnavailableError when nobody answers in time, RefusedError when the
    certificate is refused or is none of ours."""
    target = address if address.startswith("unix:") else parse_target(address)
    credentials, identity = (None, None) if tls is None else channel_credentials(tls)
    channel = open_channel(target, credentials, "control", identity)
    try:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        response = await answer_to(
            address,
            lambda left_s: check(health_pb2.HealthCheckRequest(), timeout=left_s, wait_for_ready=False),
            timeout_s,
        )
    finally:
        await channel.close()
    return response.status == health_pb2.HealthCheckResponse.SERVING

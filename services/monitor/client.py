"""A typed client of MonitorService."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType

import grpc

from heterorl.v1 import monitor_pb2, monitor_pb2_grpc
from services.runtime.address import parse_target
from services.runtime.errors import HeteroRLError, UnavailableError
from services.wire.channel import open_channel
from services.wire.credentials import channel_credentials
from services.wire.errors import from_rpc_error
from services.wire.identity import Identity, Role
from services.wire.tls import TlsFiles


def dial(target: str, tls: TlsFiles | None, role: Role) -> grpc.aio.Channel:
    """A channel to HOST:PORT. tls: None dials without TLS, to loopback only, and says that we are `role` "local"."""
    address = parse_target(target)
    if tls is None:
        return open_channel(address, None, "control", Identity(role=role, id="local"))
    credentials, identity = channel_credentials(tls)
    return open_channel(address, credentials, "control", identity)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step or evaluation, as in metrics.jsonl."""

    step: int
    wall_s: float
    metrics: dict[str, float]


def unanswered(target: str, error: grpc.aio.AioRpcError) -> HeteroRLError:
    """The error of a failed call; silence gets a sentence that names who is silent."""
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return UnavailableError(f"{target} does not answer: is it running, and do its certificates fit ours?")
    return from_rpc_error(error)


class MonitorClient:
    """Looks at one learner. Use as an async context manager. Calls raise the errors of `services.wire.errors`."""

    def __init__(self, target: str, tls: TlsFiles | None) -> None:
        """target: HOST:PORT. tls: None connects without TLS, to loopback addresses only."""
        self._target = target
        self._channel = dial(target, tls, Role.MONITOR)
        self._stub: monitor_pb2_grpc.MonitorServiceAsyncStub = monitor_pb2_grpc.MonitorServiceStub(self._channel)

    async def __aenter__(self) -> "MonitorClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def status(self, timeout_s: float = 10.0) -> monitor_pb2.RunStatus:
        """The state now."""
        try:
            response = await self._stub.GetStatus(monitor_pb2.GetStatusRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise unanswered(self._target, error) from None
        return response.status

    async def watch(self, interval_ms: int = 1000) -> AsyncIterator[monitor_pb2.RunStatus]:
        """The state now, then at each change. Ends when the learner does."""
        try:
            async for response in self._stub.WatchStatus(monitor_pb2.WatchStatusRequest(interval_ms=interval_ms)):
                yield response.status
        except grpc.aio.AioRpcError as error:
            raise unanswered(self._target, error) from None

    async def steps(self, from_step: int = 0) -> AsyncIterator[StepRecord]:
        """Every record from a step on, then new ones. Ends when the learner does."""
        try:
            async for record in self._stub.WatchSteps(monitor_pb2.WatchStepsRequest(from_step=from_step)):
                yield StepRecord(step=record.step, wall_s=record.wall_s, metrics=dict(record.metrics))
        except grpc.aio.AioRpcError as error:
            raise unanswered(self._target, error) from None

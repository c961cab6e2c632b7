"""A typed client of MonitorService."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import grpc

from heterorl.v1 import monitor_pb2, monitor_pb2_grpc
from services.runtime.address import parse_target
from services.runtime.errors import HeteroRLError, UnavailableError
from services.wire.channel import open_channel, route_to
from services.wire.credentials import channel_credentials
from services.wire.errors import from_rpc_error, no_learner
from services.wire.identity import Identity, Role
from services.wire.tls import TlsFiles

_T = TypeVar("_T")
_TRIED_S = 1.0
"""A call that fails sooner was turned away for a reason that time does not heal, such as an unknown host."""


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


async def answer_to(target: str, call: Callable[[float], Awaitable[_T]], timeout_s: float) -> _T:
    """*Waits for* the answer to `call`, which gets the seconds that are left and must not wait for a connection, so
    that it fails with gRPC's reason; it is tried anew until the time is up, since handshakes on a bad link take long.

    Raises the errors of `services.wire.errors`, and UnavailableError with the reason for silence.
    """
    end_s = time.monotonic() + timeout_s
    unreached: grpc.aio.AioRpcError | None = None
    while True:
        began_s = time.monotonic()
        try:
            return await call(end_s - began_s)
        except grpc.aio.AioRpcError as error:
            now_s = time.monotonic()
            if (
                error.code() is not grpc.StatusCode.UNAVAILABLE
                or now_s - began_s < _TRIED_S
                or end_s - now_s < _TRIED_S
            ):
                overdue = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                raise unanswered(target, unreached if overdue and unreached is not None else error) from None
            unreached = error


def unanswered(target: str, error: grpc.aio.AioRpcError) -> HeteroRLError:
    """The error of a failed call; silence gets a sentence that names who is silent, and gRPC's reason if it has one."""
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return no_learner(target)
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return from_rpc_error(error)
    reason = error.details() if error.code() is grpc.StatusCode.UNAVAILABLE else None
    where = target if target.startswith("unix:") else route_to(parse_target(target))
    return UnavailableError(
        f"{where} does not answer: is it running, and do its certificates fit ours?"
        + (f" ({reason})" if reason else "")
    )


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
        response = await answer_to(
            self._target,
            lambda left_s: self._stub.GetStatus(monitor_pb2.GetStatusRequest(), timeout=left_s, wait_for_ready=False),
            timeout_s,
        )
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

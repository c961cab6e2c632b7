"""A client of AdminService: what operators change in a running learner. Needs a certificate of role admin."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import grpc

from heterorl.v1 import admin_pb2, admin_pb2_grpc
from services.monitor.client import dial, unanswered
from services.wire.identity import Role
from services.wire.tls import TlsFiles

CALL_TIMEOUT_S = 15.0


Action: TypeAlias = "Callable[[admin_pb2_grpc.AdminServiceAsyncStub], Awaitable[object]]"


def drain(sampler_id: str) -> Action:
    """The sampler finishes, submits its spool and ends."""
    return lambda stub: stub.DrainSampler(admin_pb2.DrainSamplerRequest(sampler_id=sampler_id), timeout=CALL_TIMEOUT_S)


def evict(sampler_id: str, *, allow: bool) -> Action:
    """The sampler's session ends and its id is refused; allow lets it back."""
    return lambda stub: stub.EvictSampler(
        admin_pb2.EvictSamplerRequest(sampler_id=sampler_id, allow=allow), timeout=CALL_TIMEOUT_S
    )


def pause(reason: str) -> Action:
    """No leases and no steps until `resume`."""
    return lambda stub: stub.Pause(admin_pb2.PauseRequest(reason=reason), timeout=CALL_TIMEOUT_S)


def resume() -> Action:
    """Ends a pause."""
    return lambda stub: stub.Resume(admin_pb2.ResumeRequest(), timeout=CALL_TIMEOUT_S)


def stop(reason: str) -> Action:
    """The learner finishes its step, writes a checkpoint and ends with exit code 0."""
    return lambda stub: stub.Stop(admin_pb2.StopRequest(reason=reason), timeout=CALL_TIMEOUT_S)


async def perform(target: str, tls: TlsFiles | None, action: Action) -> None:
    """Dials, acts once, hangs up. Raises the errors of `services.wire.errors`, UnavailableError for silence."""
    channel = dial(target, tls, Role.ADMIN)
    try:
        await action(admin_pb2_grpc.AdminServiceStub(channel))
    except grpc.aio.AioRpcError as error:
        raise unanswered(target, error) from None
    finally:
        await channel.close()

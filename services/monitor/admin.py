"""A client of AdminService: what operators change in a running learner. Needs a certificate of role admin."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from heterorl.v1 import admin_pb2, admin_pb2_grpc
from services.monitor.client import answer_to, dial
from services.wire.identity import Role
from services.wire.tls import TlsFiles

CALL_TIMEOUT_S = 15.0


Action: TypeAlias = "Callable[[admin_pb2_grpc.AdminServiceAsyncStub, float], Awaitable[object]]"
"""Acts within so many seconds, and does not wait for a connection: `answer_to`."""


def drain(sampler_id: str) -> Action:
    """The sampler finishes, submits its spool and ends."""
    return lambda stub, left_s: stub.DrainSampler(
        admin_pb2.DrainSamplerRequest(sampler_id=sampler_id), timeout=left_s, wait_for_ready=False
    )


def evict(sampler_id: str, *, allow: bool) -> Action:
    """The sampler's session ends and its id is refused; allow lets it back."""
    return lambda stub, left_s: stub.EvictSampler(
        admin_pb2.EvictSamplerRequest(sampler_id=sampler_id, allow=allow), timeout=left_s, wait_for_ready=False
    )


def pause(reason: str) -> Action:
    """No leases and no steps until `resume`."""
    return lambda stub, left_s: stub.Pause(admin_pb2.PauseRequest(reason=reason), timeout=left_s, wait_for_ready=False)


def resume() -> Action:
    """Ends a pause."""
    return lambda stub, left_s: stub.Resume(admin_pb2.ResumeRequest(), timeout=left_s, wait_for_ready=False)


def stop(reason: str) -> Action:
    """The learner finishes its step, writes a checkpoint and ends with exit code 0."""
    return lambda stub, left_s: stub.Stop(admin_pb2.StopRequest(reason=reason), timeout=left_s, wait_for_ready=False)


async def perform(target: str, tls: TlsFiles | None, action: Action) -> None:
    """Dials, acts once, hangs up. Raises the errors of `services.wire.errors`, UnavailableError for silence."""
    channel = dial(target, tls, Role.ADMIN)
    stub: admin_pb2_grpc.AdminServiceAsyncStub = admin_pb2_grpc.AdminServiceStub(channel)
    try:
        await answer_to(target, lambda left_s: action(stub, left_s), CALL_TIMEOUT_S)
    finally:
        await channel.close()

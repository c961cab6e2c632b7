"""AdminService: what operators change in a running learner. Every call leaves an audit line in the log."""

from collections.abc import Callable

import grpc

from heterorl.v1 import admin_pb2, admin_pb2_grpc
from services.learner.run_control import RunControl
from services.learner.sessions import Sessions
from services.runtime.errors import InputMissingError
from services.runtime.log import get_logger
from services.wire.interceptors import peer_identity

_Drain = grpc.aio.ServicerContext[admin_pb2.DrainSamplerRequest, admin_pb2.DrainSamplerResponse]
_Evict = grpc.aio.ServicerContext[admin_pb2.EvictSamplerRequest, admin_pb2.EvictSamplerResponse]
_Pause = grpc.aio.ServicerContext[admin_pb2.PauseRequest, admin_pb2.PauseResponse]
_Resume = grpc.aio.ServicerContext[admin_pb2.ResumeRequest, admin_pb2.ResumeResponse]
_Stop = grpc.aio.ServicerContext[admin_pb2.StopRequest, admin_pb2.StopResponse]

_audit = get_logger("learner.audit")


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Acts on sessions and on the run's control. `wake` lets calls that wait for leases hear of it."""

    def __init__(self, sessions: Sessions, control: RunControl, wake: Callable[[], None]) -> None:
        self._sessions = sessions
        self._control = control
        self._wake = wake

    async def DrainSampler(
        self, request: admin_pb2.DrainSamplerRequest, context: _Drain
    ) -> admin_pb2.DrainSamplerResponse:
        sampler = self._sessions.find(request.sampler_id)
        if sampler is None:
            raise InputMissingError(f"no sampler {request.sampler_id!r} has registered with this learner")
        sampler.draining = True
        self._wake()
        _audit.info("drain_sampler", by=peer_identity(context), sampler=request.sampler_id)
        return admin_pb2.DrainSamplerResponse()

    async def EvictSampler(
        self, request: admin_pb2.EvictSamplerRequest, context: _Evict
    ) -> admin_pb2.EvictSamplerResponse:
        name = request.sampler_id
        if self._sessions.find(name) is None and not self._sessions.is_evicted(name):
            raise InputMissingError(f"no sampler {name!r} has registered with this learner, and none is evicted")
        await self._sessions.evict(name, allow=request.allow)
        _audit.info("evict_sampler", by=peer_identity(context), sampler=name, allow=request.allow)
        return admin_pb2.EvictSamplerResponse()

    async def Pause(self, request: admin_pb2.PauseRequest, context: _Pause) -> admin_pb2.PauseResponse:
        self._control.pause()
        self._sessions.paused = True
        self._wake()
        _audit.info("pause", by=peer_identity(context), reason=request.reason)
        return admin_pb2.PauseResponse()

    async def Resume(self, request: admin_pb2.ResumeRequest, context: _Resume) -> admin_pb2.ResumeResponse:
        self._sessions.paused = False
        self._control.resume()
        _audit.info("resume", by=peer_identity(context))
        return admin_pb2.ResumeResponse()

    async def Stop(self, request: admin_pb2.StopRequest, context: _Stop) -> admin_pb2.StopResponse:
        _audit.info("stop", by=peer_identity(context), reason=request.reason)
        self._control.stop(request.reason or "asked by an operator")
        return admin_pb2.StopResponse()

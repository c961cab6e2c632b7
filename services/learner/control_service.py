"""ControlService: registration, heartbeats and leases. Every call checks identity and session first."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from heterorl.v1 import control_pb2, control_pb2_grpc, types_pb2
from services.learner.data_plane import DataPlane
from services.learner.published import Origin
from services.learner.sessions import Sampler
from services.runtime.errors import BadInputError, MismatchError
from services.runtime.log import get_logger
from services.wire.convert import (
    from_engine,
    from_heartbeat,
    from_lease_ids,
    from_session,
    to_lease,
    to_run_settings,
    to_session,
)
from services.wire.identity import require_id
from services.wire.interceptors import CallFacts, require_peer_id
from services.wire.types import FEATURES, PROTOCOL_VERSION, Directive, RunSettings, Session

_log = get_logger("learner.control")

_MOST_WAIT_S = 20.0
_PAUSE_WAIT_S = 1.0
"""How long a call is held that gets nothing whatever comes back: the end of that must be noticed soon."""
_MOST_LEASES = 4096

_Register = grpc.aio.ServicerContext[control_pb2.RegisterRequest, control_pb2.RegisterResponse]
_Heartbeat = grpc.aio.ServicerContext[control_pb2.HeartbeatRequest, control_pb2.HeartbeatResponse]
_Lease = grpc.aio.ServicerContext[control_pb2.LeasePromptsRequest, control_pb2.LeasePromptsResponse]
_Release = grpc.aio.ServicerContext[control_pb2.ReleaseLeasesRequest, control_pb2.ReleaseLeasesResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """How often a sampler reports."""

    heartbeat_s: float
    session_ttl_s: float


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """`settings` gives what every sampler must share; it is asked at each registration."""

    def __init__(self, plane: DataPlane, settings: Callable[[], RunSettings], contact: Contact) -> None:
        self._plane = plane
        self._settings = settings
        self._contact = contact

    async def Register(self, request: control_pb2.RegisterRequest, context: _Register) -> control_pb2.RegisterResponse:
        require_peer_id(context, require_id(request.sampler_id))
        settings = self._settings()
        if not request.protocol_min <= PROTOCOL_VERSION <= request.protocol_max:
            raise MismatchError(
                f"the sampler speaks protocol {request.protocol_min} to {request.protocol_max} and this learner "
                f"{PROTOCOL_VERSION}: update the older one"
            )
        if request.model_files_sha256 not in ("", settings.model_files_sha256):
            raise MismatchError("the sampler's own model files differ from the run's: let it take the learner's")
        if len(request.spool_id) > 64:
            raise BadInputError("a spool id has at most 64 characters")
        session = await self._plane.sessions.register(
            request.sampler_id,
            hostname=request.hostname[:256],
            engine=from_engine(request.engine) if request.HasField("engine") else None,
            spool_id=request.spool_id,
            last_run_id=request.last_run_id,
            features=FEATURES.intersection(request.features),
        )
        self._plane.leases.replace_session(request.sampler_id)
        _log.info(
            "sampler_registered",
            sampler_id=request.sampler_id,
            session_epoch=session.session_epoch,
            hostname=request.hostname[:256],
        )
        return control_pb2.RegisterResponse(
            session=to_session(session),
            settings=to_run_settings(settings),
            heartbeat_interval_ms=int(self._contact.heartbeat_s * 1000),
            session_ttl_ms=int(self._contact.session_ttl_s * 1000),
            protocol_version=PROTOCOL_VERSION,
            learner_version=max(0, self._plane.learner_version),
        )

    async def Heartbeat(
        self, request: control_pb2.HeartbeatRequest, context: _Heartbeat
    ) -> control_pb2.HeartbeatResponse:
        session, sampler = check_session(self._plane, context, request.session)
        report, first = from_heartbeat(request), sampler.report is None
        directive = self._plane.sessions.heartbeat(session, report)
        if first:
            self._plane.leases.wake()  # leases may have been refused until its weights are known
        lost = self._plane.leases.renew(
            session.sampler_id, session.session_epoch, report.lease_ids, report.policy_version
        )
        return control_pb2.HeartbeatResponse(
            directive=control_pb2.Directive.ValueType(directive.value),
            lost_lease_ids=lost,
            learner_version=max(0, self._plane.learner_version),
        )

    async def LeasePrompts(
        self, request: control_pb2.LeasePromptsRequest, context: _Lease
    ) -> control_pb2.LeasePromptsResponse:
        session, sampler = check_session(self._plane, context, request.session)
        if request.max_leases < 1:
            raise BadInputError("max_leases must be at least 1")
        wait_s = min(request.wait_ms / 1000, _MOST_WAIT_S)
        if reason := self._why_none(sampler, request.policy_version):
            await self._plane.leases.wait_for_change(min(wait_s, _PAUSE_WAIT_S))
            return control_pb2.LeasePromptsResponse(reason=reason)
        granted = await self._plane.leases.grant(
            session.sampler_id,
            session.session_epoch,
            min(request.max_leases, _MOST_LEASES),
            request.policy_version,
            wait_s,
            lambda: self._why_none(sampler, request.policy_version),
        )
        return control_pb2.LeasePromptsResponse(leases=map(to_lease, granted.leases), reason=granted.reason)

    async def ReleaseLeases(
        self, request: control_pb2.ReleaseLeasesRequest, context: _Release
    ) -> control_pb2.ReleaseLeasesResponse:
        session, _ = check_session(self._plane, context, request.session)
        lease_ids, reason = from_lease_ids(request.lease_ids), request.reason[:80]
        _log.info("leases_released", sampler_id=session.sampler_id, n=len(lease_ids), reason=reason)
        self._plane.leases.release(session.sampler_id, lease_ids, reason)
        return control_pb2.ReleaseLeasesResponse()

    def _why_none(self, sampler: Sampler, policy_version: int) -> str:
        match self._plane.sessions.directive(sampler):
            case Directive.DRAIN:
                return "draining"
            case Directive.PAUSE:
                return "paused"
            case Directive.CONTINUE if sampler.quarantined:
                return "paused"
            case Directive.CONTINUE:
                return "" if self._holds_known_weights(sampler, policy_version) else "weights"

    def _holds_known_weights(self, sampler: Sampler, policy_version: int) -> bool:
        """False while it holds a version that this learner, restored from an older checkpoint, has not made: groups of
        it would be refused, and in the end put the sampler into quarantine."""
        if 0 <= self._plane.versions.current < policy_version:
            return False
        report = sampler.report
        if report is None:
            return policy_version == 0  # of another it may hold what this learner's past does not know: its root tells
        if not report.policy_root:
            return True
        origin = self._plane.versions.origin(report.policy_version, report.policy_root)
        return origin in (Origin.PUBLISHED, Origin.FORGOTTEN)


def check_session(plane: DataPlane, context: CallFacts, message: types_pb2.Session) -> tuple[Session, Sampler]:
    """The call's session, if the caller is who it says and no newer process took over.

    Raises RefusedError, FencedError, SessionLostError.
    """
    session = from_session(message)
    require_peer_id(context, session.sampler_id)
    return session, plane.sessions.check(session)

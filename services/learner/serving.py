"""The learner's gRPC server: five services and health behind one port, each method for its roles only."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from heterorl.v1 import (
    admin_pb2_grpc,
    control_pb2_grpc,
    monitor_pb2_grpc,
    rollouts_pb2_grpc,
    weights_pb2_grpc,
)
from services.learner.admin_service import AdminService
from services.learner.control_service import ControlService
from services.learner.disk_room import DiskRoom
from services.learner.monitor_service import MonitorService
from services.learner.rollout_service import RolloutService
from services.learner.sessions import Sessions
from services.learner.weight_service import WeightService
from services.runtime.address import Address
from services.wire.identity import Identity, Role
from services.wire.interceptors import HEALTH_RULES, AccessRules, server_interceptors
from services.wire.server import MAX_CONNECTIONS, bind, build_server

STOP_GRACE_S = 5.0
"""Streams that did not end by themselves after the drain are cut this much later."""

_METHODS: dict[str, tuple[str, ...]] = {
    "ControlService": ("Register", "Heartbeat", "LeasePrompts", "ReleaseLeases"),
    "WeightService": ("WatchPolicy", "GetPlan", "FetchObject", "FollowUpdate"),
    "RolloutService": ("SubmitGroups",),
    "MonitorService": ("GetStatus", "WatchStatus", "WatchSteps"),
    "AdminService": ("DrainSampler", "EvictSampler", "Pause", "Resume", "Stop"),
}
_ROLES: dict[str, frozenset[Role]] = {
    "ControlService": frozenset({Role.SAMPLER}),
    "WeightService": frozenset({Role.SAMPLER, Role.RELAY, Role.ADMIN}),
    "RolloutService": frozenset({Role.SAMPLER}),
    "MonitorService": frozenset({Role.MONITOR, Role.ADMIN}),
    "AdminService": frozenset({Role.ADMIN}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerServices:
    """What the port serves."""

    control: ControlService
    weights: WeightService
    rollouts: RolloutService
    monitor: MonitorService
    admin: AdminService


def access_rules() -> AccessRules:
    """Who may call what; everything else is refused."""
    rules = {
        f"/heterorl.v1.{service}/{method}": _ROLES[service] for service, names in _METHODS.items() for method in names
    }
    return {**rules, **HEALTH_RULES}


class LearnerServer:
    """Binds at once, so that a port in use ends the start before the model is loaded; serves inside `serving`."""

    def __init__(
        self, address: Address, credentials: grpc.ServerCredentials | None, max_connections: int = MAX_CONNECTIONS
    ) -> None:
        interceptors = server_interceptors(access_rules(), self._is_denied)
        self._server = build_server("learner", interceptors, max_connections)
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.address = bind(self._server, address, credentials)
        self._sessions: Sessions | None = None

    async def show(self, room: DiskRoom) -> None:
        """For ever: NOT_SERVING while groups cannot be written."""
        while True:
            full = await room.change()
            status = health_pb2.HealthCheckResponse.NOT_SERVING if full else health_pb2.HealthCheckResponse.SERVING
            await self._health.set("", status)

    def _is_denied(self, identity: Identity) -> bool:
        known = self._sessions
        return identity.role is Role.SAMPLER and known is not None and known.is_evicted(identity.id)

    @asynccontextmanager
    async def serving(
        self, services: LearnerServices, sessions: Sessions, drain: asyncio.Event
    ) -> AsyncGenerator[None]:
        """Serves while the block runs; at its end: NOT_SERVING, GoAway (`drain`), then the server stops."""
        self._sessions = sessions
        control_pb2_grpc.add_ControlServiceServicer_to_server(services.control, self._server)
        weights_pb2_grpc.add_WeightServiceServicer_to_server(services.weights, self._server)
        rollouts_pb2_grpc.add_RolloutServiceServicer_to_server(services.rollouts, self._server)
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server(services.monitor, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(services.admin, self._server)
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        try:
            yield
        finally:
            await self._health.enter_graceful_shutdown()
            drain.set()
            await self._server.stop(STOP_GRACE_S)

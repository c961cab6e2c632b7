"""What the port says of the learner's health."""

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from heterorl.v1 import admin_pb2_grpc, control_pb2_grpc, monitor_pb2_grpc, rollouts_pb2_grpc, weights_pb2_grpc
from services.learner.disk_room import DiskRoom
from services.learner.serving import LearnerServer, LearnerServices
from services.runtime.address import Address
from services.runtime.errors import DiskFullError

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_learner_that_cannot_write_says_that_it_does_not_serve_until_it_can() -> None:
    server = LearnerServer(Address(host="127.0.0.1", port=0), None)
    services = LearnerServices(
        control=control_pb2_grpc.ControlServiceServicer(),
        weights=weights_pb2_grpc.WeightServiceServicer(),
        rollouts=rollouts_pb2_grpc.RolloutServiceServicer(),
        monitor=monitor_pb2_grpc.MonitorServiceServicer(),
        admin=admin_pb2_grpc.AdminServiceServicer(),
    )
    room = DiskRoom()
    async with (
        server.serving(services, None, asyncio.Event()),
        grpc.aio.insecure_channel(str(server.address)) as channel,
        asyncio.timeout(20),
    ):
        showing = asyncio.create_task(server.show(room))
        seen = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await seen.read()).status == SERVING
        room.refused("groups", DiskFullError("no room"))
        assert (await seen.read()).status == NOT_SERVING
        room.written("groups")
        assert (await seen.read()).status == SERVING
        showing.cancel()

"""A learner's data side behind a real gRPC server on loopback, and a sampler that speaks to it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from heterorl.v1 import control_pb2, control_pb2_grpc, rollouts_pb2, rollouts_pb2_grpc
from services.learner.control_service import Contact, ControlService
from services.learner.data_plane import DataPlane
from services.learner.data_settings import DataSettings
from services.learner.rollout_service import RolloutService
from services.runtime.address import Address
from services.wire.channel import channel_options
from services.wire.convert import (
    from_lease,
    from_session,
    from_verdict,
    to_envelope,
    to_heartbeat,
    to_session,
)
from services.wire.identity import Identity, Role
from services.wire.interceptors import ErrorInterceptor
from services.wire.server import bind, build_server
from services.wire.types import (
    PROTOCOL_VERSION,
    GroupEnvelope,
    Lease,
    SamplerReport,
    SamplerState,
    Session,
    Verdict,
)
from tests.support.data_side import RUN_SETTINGS, Clock, open_plane


@dataclass
class LearnerOfTests:
    plane: DataPlane
    address: Address
    clock: Clock
    drain: asyncio.Event


@contextlib.asynccontextmanager
async def running_learner(
    folder: Path, settings: DataSettings | None = None, hello_timeout_s: float = 10.0, credit_bytes: int = 1 << 20
) -> AsyncGenerator[LearnerOfTests]:
    clock, drain = Clock(), asyncio.Event()
    plane = await open_plane(folder, settings, clock)
    server = build_server("learner", [ErrorInterceptor()])
    contact = Contact(heartbeat_s=10, session_ttl_s=30)
    control_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(plane, lambda: RUN_SETTINGS, contact), server)
    rollouts_pb2_grpc.add_RolloutServiceServicer_to_server(
        RolloutService(plane, drain, hello_timeout_s, credit_bytes), server
    )
    address = bind(server, Address(host="127.0.0.1", port=0), None)
    intake = asyncio.create_task(plane.run())
    await server.start()
    try:
        yield LearnerOfTests(plane=plane, address=address, clock=clock, drain=drain)
    finally:
        await server.stop(0.2)
        intake.cancel()
        await asyncio.wait([intake])
        await plane.close()


@dataclass
class Stream:
    """An open submission stream, after its Welcome."""

    call: grpc.aio.StreamStreamCall
    welcome: rollouts_pb2.SubmitWelcome
    verdicts: list[Verdict] = field(default_factory=list)

    async def send(self, *envelopes: GroupEnvelope) -> None:
        for envelope in envelopes:
            await self.call.write(rollouts_pb2.SubmitGroupsRequest(group=to_envelope(envelope)))

    async def read(self) -> rollouts_pb2.SubmitGroupsResponse:
        return await self.call.read()

    async def verdicts_for(self, *envelopes: GroupEnvelope) -> list[Verdict]:
        """Sends and waits for as many verdicts."""
        await self.send(*envelopes)
        return await self.next_verdicts(len(envelopes))

    async def next_verdicts(self, count: int) -> list[Verdict]:
        while len(self.verdicts) < count:
            message = await self.read()
            assert message.WhichOneof("message") == "ack", message
            self.verdicts += map(from_verdict, message.ack.verdicts)
        given, self.verdicts = self.verdicts[:count], self.verdicts[count:]
        return given


class SamplerOfTests:
    """A sampler process as the learner sees it."""

    def __init__(self, channel: grpc.aio.Channel, sampler_id: str) -> None:
        self.sampler_id = sampler_id
        self.control = control_pb2_grpc.ControlServiceStub(channel)
        self.rollouts = rollouts_pb2_grpc.RolloutServiceStub(channel)
        self.spool_id = f"spool-of-{sampler_id}"
        self.session = Session(run_id="", sampler_id=sampler_id, learner_epoch=0, session_epoch=0)

    async def register(self, features: Sequence[str] = (), **fields: object) -> control_pb2.RegisterResponse:
        request = control_pb2.RegisterRequest(
            sampler_id=self.sampler_id,
            protocol_min=PROTOCOL_VERSION,
            protocol_max=PROTOCOL_VERSION,
            spool_id=self.spool_id,
        )
        request.features.extend(features)
        for name, value in fields.items():
            setattr(request, name, value)
        response = await self.control.Register(request)
        self.session = from_session(response.session)
        return response

    async def lease(self, count: int, version: int = 0, wait_ms: int = 0) -> list[Lease]:
        response = await self.lease_response(count, version, wait_ms)
        return [from_lease(lease) for lease in response.leases]

    async def lease_response(self, count: int, version: int = 0, wait_ms: int = 0) -> control_pb2.LeasePromptsResponse:
        return await self.control.LeasePrompts(
            control_pb2.LeasePromptsRequest(
                session=to_session(self.session), max_leases=count, policy_version=version, wait_ms=wait_ms
            )
        )

    async def heartbeat(
        self, leases: list[Lease], version: int = 0, policy_root: str = ""
    ) -> control_pb2.HeartbeatResponse:
        report = SamplerReport(
            state=SamplerState.GENERATING,
            policy_version=version,
            policy_root=policy_root,
            lease_ids=tuple(lease.lease_id for lease in leases),
        )
        return await self.control.Heartbeat(to_heartbeat(self.session, report))

    async def release(self, leases: list[Lease], reason: str = "drain") -> None:
        await self.control.ReleaseLeases(
            control_pb2.ReleaseLeasesRequest(
                session=to_session(self.session), lease_ids=[lease.lease_id for lease in leases], reason=reason
            )
        )

    async def open_stream(self, spool_id: str | None = None) -> Stream:
        call = self.rollouts.SubmitGroups()
        hello = rollouts_pb2.SubmitHello(session=to_session(self.session), spool_id=spool_id or self.spool_id)
        await call.write(rollouts_pb2.SubmitGroupsRequest(hello=hello))
        message = await call.read()
        assert isinstance(message, rollouts_pb2.SubmitGroupsResponse), await call.code()
        assert message.WhichOneof("message") == "welcome"
        return Stream(call=call, welcome=message.welcome)


@contextlib.asynccontextmanager
async def sampler(learner: LearnerOfTests, sampler_id: str = "eu-1") -> AsyncGenerator[SamplerOfTests]:
    """Registered, unless the test does it itself with other fields."""
    identity = Identity(role=Role.SAMPLER, id=sampler_id)
    async with grpc.aio.insecure_channel(str(learner.address), channel_options("control", identity)) as channel:
        one = SamplerOfTests(channel, sampler_id)
        await one.register()
        yield one

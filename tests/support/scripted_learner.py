"""A learner of a few lines on real grpc.aio, whose faults are scripted: for tests of the sampler's half."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import google_crc32c
import grpc

from heterorl.v1 import (
    control_pb2,
    control_pb2_grpc,
    rollouts_pb2,
    rollouts_pb2_grpc,
    weights_pb2,
    weights_pb2_grpc,
)
from services.runtime.address import Address
from services.runtime.errors import HeteroRLError
from services.sampler.session import LearnerSession
from services.sampler.spool import Spool
from services.wire.channel import open_channel
from services.wire.convert import encode_manifest, to_run_settings, to_session, to_signed
from services.wire.delta import BitTensor, EncodedUpdate, encode_delta, encode_keyframe, root_of
from services.wire.errors import abort
from services.wire.signing import ManifestSigner
from services.wire.types import GraderSpec, Manifest, RunSettings, SamplingSettings, Session, SignedManifest

RUN_ID = "run"
SETTINGS = RunSettings(
    model_files=(),
    model_files_sha256="",
    vocab_size=18,
    weights_dtype="BF16",
    group_size=2,
    max_staleness=4,
    max_prompt_tokens=32,
    sampling=SamplingSettings(temperature=1.0, max_completion_tokens=8),
    eval_sampling=SamplingSettings(temperature=0.0, max_completion_tokens=8),
    graders=(GraderSpec(name="exact"),),
)


@dataclass(slots=True, kw_only=True)
class ScriptedControl(control_pb2_grpc.ControlServiceServicer):
    """Registers everyone; `heartbeat_errors` are raised one per heartbeat."""

    settings: RunSettings = SETTINGS
    registrations: int = 0
    features: list[str] = field(default_factory=list[str])
    """Of the newest registration."""
    heartbeats: list[control_pb2.HeartbeatRequest] = field(default_factory=list[control_pb2.HeartbeatRequest])
    heartbeat_errors: list[HeteroRLError] = field(default_factory=list[HeteroRLError])

    async def Register(self, request: control_pb2.RegisterRequest, context: object) -> control_pb2.RegisterResponse:
        self.registrations += 1
        self.features = list(request.features)
        session = Session(
            run_id=RUN_ID, sampler_id=request.sampler_id, learner_epoch=1, session_epoch=self.registrations
        )
        return control_pb2.RegisterResponse(
            session=to_session(session),
            settings=to_run_settings(self.settings),
            heartbeat_interval_ms=100,
            session_ttl_ms=1000,
            protocol_version=1,
        )

    async def Heartbeat(
        self, request: control_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.HeartbeatResponse:
        self.heartbeats.append(request)
        if self.heartbeat_errors:
            await abort(context, self.heartbeat_errors.pop(0))
        return control_pb2.HeartbeatResponse(directive=control_pb2.DIRECTIVE_CONTINUE)


@dataclass(slots=True, kw_only=True)
class ScriptedRollouts(rollouts_pb2_grpc.RolloutServiceServicer):
    """Commits groups in order. `cuts`: for each stream, after how many groups it ends without an Ack of the last."""

    cuts: list[int] = field(default_factory=list[int])
    credit_bytes: int = 1 << 20
    journal: list[bytes] = field(default_factory=list[bytes])
    duplicates: int = 0
    streams: int = 0
    ack_beyond: int = 0
    """How many groups too many the first Ack covers."""

    async def SubmitGroups(
        self, request_iterator: AsyncIterator[rollouts_pb2.SubmitGroupsRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[rollouts_pb2.SubmitGroupsResponse]:
        self.streams += 1
        cut = self.cuts.pop(0) if self.cuts else None
        await anext(request_iterator)
        welcome = rollouts_pb2.SubmitWelcome(last_committed_seq=len(self.journal), credit_bytes=self.credit_bytes)
        yield rollouts_pb2.SubmitGroupsResponse(welcome=welcome)
        seen = 0
        async for request in request_iterator:
            group = request.group
            seen += 1
            if group.seq == len(self.journal) + 1:
                assert hashlib.sha256(group.payload).digest() == group.content_sha256
                self.journal.append(group.payload)
                code = rollouts_pb2.VERDICT_CODE_ACCEPTED
            else:
                assert group.seq <= len(self.journal), "a gap"
                self.duplicates += 1
                code = rollouts_pb2.VERDICT_CODE_DUPLICATE
            if cut == seen:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut after commit, before the Ack")
            ack = rollouts_pb2.SubmitAck(
                through_seq=len(self.journal) + self.ack_beyond,
                verdicts=[rollouts_pb2.Verdict(seq=group.seq, code=code)],
                credit_bytes=self.credit_bytes,
            )
            self.ack_beyond = 0
            yield rollouts_pb2.SubmitGroupsResponse(ack=ack)


class ScriptedWeights(weights_pb2_grpc.WeightServiceServicer):
    """Versions of weights; fetches are cut after `cut_bytes` each time, and `damage` changes what is sent."""

    def __init__(self, signer: ManifestSigner, chunk_bytes: int = 1000) -> None:
        self._signer = signer
        self._chunk_bytes = chunk_bytes
        self._versions: list[tuple[SignedManifest, Mapping[str, BitTensor], EncodedUpdate]] = []
        self._news = asyncio.Condition()
        self.cut_bytes: list[int] = []
        self.offsets: list[int] = []
        self.damaged: set[str] = set()
        self.plans: list[weights_pb2.GetPlanRequest] = []
        self.objects: dict[str, bytes] = {}

    @property
    def latest(self) -> SignedManifest:
        return self._versions[-1][0]

    async def publish(self, weights: Mapping[str, BitTensor]) -> EncodedUpdate:
        """The next version, as a delta where there is a base."""
        version = len(self._versions)
        if self._versions:
            update = encode_delta(
                self._versions[-1][1], weights, run_id=RUN_ID, base_version=version - 1, target_version=version
            )
        else:
            update = encode_keyframe(weights, run_id=RUN_ID, version=version)
        self._keep(update)
        manifest = manifest_of(version, root_of(weights), sum(tensor.nbytes for tensor in weights.values()))
        data = encode_manifest(manifest)
        signed = SignedManifest(manifest=data, signature=self._signer.sign(data), decoded=manifest)
        async with self._news:
            self._versions.append((signed, weights, update))
            self._news.notify_all()
        return update

    async def WatchPolicy(
        self, request: weights_pb2.WatchPolicyRequest, context: object
    ) -> AsyncIterator[weights_pb2.WatchPolicyResponse]:
        seen = 0
        while True:
            async with self._news:
                while len(self._versions) <= seen:
                    await self._news.wait()
            seen = len(self._versions)
            yield weights_pb2.WatchPolicyResponse(manifest=to_signed(self.latest))

    async def GetPlan(self, request: weights_pb2.GetPlanRequest, context: object) -> weights_pb2.GetPlanResponse:
        self.plans.append(request)
        signed, weights, update = self._versions[-1]
        base_root = update.info.base_root or ""
        kind = weights_pb2.UPDATE_KIND_DELTA if base_root else weights_pb2.UPDATE_KIND_KEYFRAME
        if base_root and (request.keyframe_only or request.have_root != base_root):
            update = encode_keyframe(weights, run_id=RUN_ID, version=signed.decoded.version)
            self._keep(update)
            base_root, kind = "", weights_pb2.UPDATE_KIND_KEYFRAME
        step = weights_pb2.PlanStep(
            kind=kind,
            base_root=base_root,
            target_root=signed.decoded.root,
            target_version=signed.decoded.version,
            objects=[{"object_id": hashlib.sha256(part).hexdigest(), "size_bytes": len(part)} for part in update.parts],
        )
        return weights_pb2.GetPlanResponse(target=to_signed(signed), steps=[step])

    async def FetchObject(
        self, request: weights_pb2.FetchObjectRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[weights_pb2.FetchObjectResponse]:
        data = self.objects[request.object_id]
        if request.object_id in self.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.offsets.append(request.offset)
        end = request.offset + self.cut_bytes.pop(0) if self.cut_bytes else len(data)
        for start in range(request.offset, min(end, len(data)), self._chunk_bytes):
            chunk = data[start : min(start + self._chunk_bytes, end)]
            yield weights_pb2.FetchObjectResponse(offset=start, data=chunk, crc32c=google_crc32c.value(chunk))
        if end < len(data):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    def _keep(self, update: EncodedUpdate) -> None:
        for part in update.parts:
            self.objects[hashlib.sha256(part).hexdigest()] = part


def manifest_of(version: int, root: str, full_bytes: int = 0) -> Manifest:
    """Of a version of which only the root and the size matter."""
    return Manifest(
        run_id=RUN_ID,
        learner_epoch=1,
        version=version,
        root=root,
        parent_root="",
        full_bytes=full_bytes,
        parameters=0,
        changed=0,
        model_files_sha256="",
        published_unix_ms=0,
        update_bytes=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A running scripted learner and a channel to it."""

    address: Address
    channel: grpc.aio.Channel
    control: ScriptedControl


@asynccontextmanager
async def serving(
    *, rollouts: ScriptedRollouts | None = None, weights: ScriptedWeights | None = None
) -> AsyncIterator[Served]:
    server = grpc.aio.server()
    control = ScriptedControl()
    control_pb2_grpc.add_ControlServiceServicer_to_server(control, server)
    rollouts_pb2_grpc.add_RolloutServiceServicer_to_server(rollouts or ScriptedRollouts(), server)
    if weights is not None:
        weights_pb2_grpc.add_WeightServiceServicer_to_server(weights, server)
    address = Address(host="127.0.0.1", port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    channel = open_channel(address, None, "control")
    try:
        yield Served(address=address, channel=channel, control=control)
    finally:
        await channel.close()
        await server.stop(0)


async def registered(served: Served, spool: Spool, give_up_s: float = 0.0) -> LearnerSession:
    """A session with the scripted learner."""
    session = LearnerSession(
        control=control_pb2_grpc.ControlServiceStub(served.channel),
        learner=served.address,
        sampler_id="sampler-1",
        spool=spool,
        engine=lambda: None,
        give_up_s=give_up_s,
    )
    await session.register()
    return session

"""WeightService: announcements, plans, and the bytes of objects.

WatchPolicy  ◄─ Publisher (latest wins)      GetPlan ◄─ Planner      FetchObject ◄─ ObjectStore (pread in a thread)
FollowUpdate ◄─ Publisher, ObjectStore: what WatchPolicy names, unasked
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import grpc

from heterorl.v1 import weights_pb2, weights_pb2_grpc
from services.learner.object_store import ObjectStore, OpenObject
from services.learner.plans import Planner
from services.learner.publisher import News, Publisher
from services.learner.run_control import unless_set
from services.learner.traffic import Traffic
from services.runtime.errors import SessionLostError, UnavailableError
from services.runtime.failpoints import hit
from services.wire.convert import to_announcement, to_object, to_plan
from services.wire.interceptors import peer_identity
from services.wire.objects import MAX_CHUNK_BYTES, read_chunk
from services.wire.types import Announcement, Coming, ObjectRef, PlanStep

STALL_S = 60.0
"""A receiver that takes nothing for this long is cut: it fetches again from where it was."""

_Watch = grpc.aio.ServicerContext[weights_pb2.WatchPolicyRequest, weights_pb2.WatchPolicyResponse]
_Plan = grpc.aio.ServicerContext[weights_pb2.GetPlanRequest, weights_pb2.GetPlanResponse]
_Fetch = grpc.aio.ServicerContext[weights_pb2.FetchObjectRequest, weights_pb2.FetchObjectResponse]
_Follow = grpc.aio.ServicerContext[weights_pb2.FollowUpdateRequest, weights_pb2.FollowUpdateResponse]


class WeightService(weights_pb2_grpc.WeightServiceServicer):
    """`traffic` counts by the caller's id, so that a receiver's connections add up."""

    def __init__(
        self,
        *,
        run_id: str,
        publisher: Publisher,
        planner: Planner,
        store: ObjectStore,
        traffic: Traffic,
        drain: asyncio.Event,
        stall_s: float = STALL_S,
    ) -> None:
        self._run_id = run_id
        self._publisher = publisher
        self._planner = planner
        self._store = store
        self._traffic = traffic
        self._drain = drain
        self._stall_s = stall_s

    async def WatchPolicy(
        self, request: weights_pb2.WatchPolicyRequest, context: _Watch
    ) -> AsyncIterator[weights_pb2.WatchPolicyResponse]:
        """*Waits for* news; *produces* the newest version at once and after each publish, never a queue of them, and
        what there is of the next one's update while it is made; ends when the learner drains. What is named here may be
        fetched without a plan, so it counts as one."""
        self._check_run(request.run_id)
        name = peer_identity(context).id
        told: News | None = None
        while (news := await unless_set(self._drain, self._publisher.wait_for_news(told))) is not None:
            announcement = _since(told, news)
            full_bytes = news.version.manifest.decoded.full_bytes
            for update in (announcement.update, announcement.coming):
                if update is not None:
                    ids = [ref.object_id for ref in update.objects]
                    self._traffic.planned(name, update.target_version, ids, full_bytes)
            yield to_announcement(announcement)
            told = news

    async def GetPlan(self, request: weights_pb2.GetPlanRequest, context: _Plan) -> weights_pb2.GetPlanResponse:
        self._check_run(request.run_id)
        plan = await self._planner.plan(request.have_root, request.want_version, request.keyframe_only)
        target = plan.target.decoded
        ids = [ref.object_id for step in plan.steps for ref in step.objects]
        self._traffic.planned(peer_identity(context).id, target.version, ids, target.full_bytes)
        return to_plan(plan)

    async def FetchObject(  # pyright: ignore[reportIncompatibleMethodOverride] - written, so that a write can time out
        self, request: weights_pb2.FetchObjectRequest, context: _Fetch
    ) -> None:
        """*Consumes* nothing; *waits for* the disk, the receiver's flow control and its byte budget; *produces* chunks
        from the offset on; *on cancel* the object is released."""
        async with self._store.reading(request.object_id) as opened:
            if request.offset > opened.size_bytes:
                await context.abort(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"offset {request.offset} is beyond the object's {opened.size_bytes} bytes",
                )
            end = opened.size_bytes
            if request.length:
                end = min(end, request.offset + request.length)
            await self._send(opened, request.offset, end, context)

    async def _send(self, opened: OpenObject, offset: int, end: int, context: _Fetch) -> None:
        name = peer_identity(context).id
        counts = self._traffic.opened(name, opened.object_id)
        while offset < end:
            chunk = await asyncio.to_thread(read_chunk, opened.descriptor, offset, end)
            await self._traffic.pace(name, len(chunk.data))
            hit("fetch.before_chunk")
            message = weights_pb2.FetchObjectResponse(offset=offset, data=chunk.data, crc32c=chunk.crc32c)
            async with self._unless_stalled():
                await context.write(message)
            offset += len(chunk.data)
            if counts:
                self._traffic.of(name).bytes_sent += len(chunk.data)

    async def FollowUpdate(  # pyright: ignore[reportIncompatibleMethodOverride] - as FetchObject
        self, request: weights_pb2.FollowUpdateRequest, context: _Follow
    ) -> None:
        """*Waits for* the update from a base to be made, and as FetchObject does; *produces* its small objects; ends
        when the learner drains too."""
        self._check_run(request.run_id)
        name = peer_identity(context).id
        known: PlanStep | None = None
        sent = request.first
        news: News | None = None
        while (news := await unless_set(self._drain, self._publisher.wait_for_news(news))) is not None:
            step = news.coming or news.version.update
            if step is None or step.base_root != request.base_root:
                if known is not None or news.version.root != request.base_root:
                    return
                continue
            if known is not None and not _goes_on(known, step):
                sent = 0  # the one before was given up
            known = step
            full_bytes = news.version.manifest.decoded.full_bytes
            for ref in step.objects[sent:]:
                self._traffic.planned(name, step.target_version, (ref.object_id,), full_bytes)
                if ref.size_bytes <= MAX_CHUNK_BYTES:
                    await self._send_whole(ref, name, context)
            sent = len(step.objects)
            if news.coming is None:
                return

    async def _send_whole(self, ref: ObjectRef, name: str, context: _Follow) -> None:
        data = self._store.fresh(ref.object_id)
        if data is None:
            async with self._store.reading(ref.object_id) as opened:
                data = await asyncio.to_thread(os.pread, opened.descriptor, ref.size_bytes, 0)
        self._traffic.opened(name, ref.object_id)
        await self._traffic.pace(name, len(data))
        async with self._unless_stalled():
            await context.write(weights_pb2.FollowUpdateResponse(object=to_object(ref), data=data))
        self._traffic.of(name).bytes_sent += len(data)

    @asynccontextmanager
    async def _unless_stalled(self) -> AsyncGenerator[None]:
        """For a write. Raises UnavailableError where the receiver takes nothing."""
        try:
            async with asyncio.timeout(self._stall_s):
                yield
        except TimeoutError:
            raise UnavailableError(f"the receiver took nothing for {self._stall_s:.0f} s: fetch again") from None

    def _check_run(self, run_id: str) -> None:
        if run_id and run_id != self._run_id:
            raise SessionLostError(f"this learner serves run {self._run_id!r}, not {run_id!r}: register again")


def _goes_on(known: PlanStep, step: PlanStep) -> bool:
    """Whether it is the same update, with more of its objects."""
    ours = known.base_root, known.target_version
    return ours == (step.base_root, step.target_version) and step.objects[: len(known.objects)] == known.objects


def _since(told: News | None, news: News) -> Announcement:
    """What is new for someone who was told that."""
    coming: Coming | None = None
    if news.coming is not None:
        known = None if told is None else told.coming
        first = len(known.objects) if known is not None and _goes_on(known, news.coming) else 0
        coming = Coming(
            base_root=news.coming.base_root,
            target_root=news.coming.target_root,
            target_version=news.coming.target_version,
            first=first,
            objects=news.coming.objects[first:],
        )
    known_version = told is not None and told.version is news.version
    return Announcement(
        manifest=news.version.manifest, update=None if known_version else news.version.update, coming=coming
    )

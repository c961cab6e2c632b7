"""WeightService, from what the relay has: the newest announcement, remembered plans, objects on disk.

WatchPolicy ◄─ Upstream (latest wins)      GetPlan ◄─ PlanMemory      FetchObject ◄─ Bodies (one upstream fetch each)
"""

import asyncio
from collections.abc import AsyncIterator

import grpc

from heterorl.v1 import weights_pb2, weights_pb2_grpc
from services.relay.bodies import Bodies
from services.relay.plans import PlanMemory
from services.relay.upstream import Upstream
from services.runtime.errors import UnavailableError
from services.runtime.failpoints import hit
from services.wire.convert import to_announcement
from services.wire.objects import check_object_id, read_chunk
from services.wire.types import Announcement

_Watch = grpc.aio.ServicerContext[weights_pb2.WatchPolicyRequest, weights_pb2.WatchPolicyResponse]
_Plan = grpc.aio.ServicerContext[weights_pb2.GetPlanRequest, weights_pb2.GetPlanResponse]
_Fetch = grpc.aio.ServicerContext[weights_pb2.FetchObjectRequest, weights_pb2.FetchObjectResponse]
_Follow = grpc.aio.ServicerContext[weights_pb2.FollowUpdateRequest, weights_pb2.FollowUpdateResponse]


class RelayWeightService(weights_pb2_grpc.WeightServiceServicer):
    """`stall_s`: a receiver that takes nothing for this long is cut."""

    def __init__(self, *, upstream: Upstream, plans: PlanMemory, bodies: Bodies, stall_s: float) -> None:
        self._upstream = upstream
        self._plans = plans
        self._bodies = bodies
        self._stall_s = stall_s
        self.bytes_served = 0

    async def WatchPolicy(
        self, request: weights_pb2.WatchPolicyRequest, context: _Watch
    ) -> AsyncIterator[weights_pb2.WatchPolicyResponse]:
        """*Waits for* announcements; *produces* the newest at once and after each change; ends at the relay's drain."""
        seen: Announcement | None = None
        while (seen := await self._upstream.wait_for_change(seen)) is not None:
            self._plans.check_run(request.run_id)
            yield to_announcement(seen)

    async def GetPlan(self, request: weights_pb2.GetPlanRequest, context: _Plan) -> weights_pb2.GetPlanResponse:
        return await self._plans.answer(request)

    async def FetchObject(  # pyright: ignore[reportIncompatibleMethodOverride] - written, so that a write can time out
        self, request: weights_pb2.FetchObjectRequest, context: _Fetch
    ) -> None:
        """*Waits for* the object's bytes, here or from upstream, and the receiver's flow control; *produces* chunks
        from the offset on; *on cancel* the object is released."""
        offset = request.offset
        limit = offset + request.length if request.length else None
        async with self._bodies.reading(check_object_id(request.object_id)) as body:
            while True:
                readable = await body.beyond(offset)
                if offset > readable:
                    await context.abort(
                        grpc.StatusCode.OUT_OF_RANGE, f"offset {offset} is beyond the object's {readable} bytes"
                    )
                end = readable if limit is None else min(readable, limit)
                if offset >= end:
                    return
                chunk = await asyncio.to_thread(read_chunk, body.descriptor, offset, end)
                hit("relay.before_chunk")
                await self._write(
                    context, weights_pb2.FetchObjectResponse(offset=offset, data=chunk.data, crc32c=chunk.crc32c)
                )
                offset += len(chunk.data)
                self.bytes_served += len(chunk.data)

    async def FollowUpdate(  # pyright: ignore[reportIncompatibleMethodOverride] - as FetchObject
        self, request: weights_pb2.FollowUpdateRequest, context: _Follow
    ) -> None:
        """The learner alone knows what it is making; our samplers do not ask here, and others go on without."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a relay sends what it is asked for: ask the learner")

    async def _write(self, context: _Fetch, message: weights_pb2.FetchObjectResponse) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await context.write(message)
        except TimeoutError:
            raise UnavailableError(f"the receiver took nothing for {self._stall_s:.0f} s: fetch again") from None

"""Small objects of the next update, which the learner sends as each is made: no question has to travel first.

    held root ─► FollowUpdate ─► objects ─► ObjectCache        PlanFetch ─► come(ref): there, or not expected: fetched

This only works ahead: an object that did not come, or came wrong, is fetched as any other. One that is named while the
learner is to send it is waited for, so that it does not travel twice; where nothing comes for a while that ends.
"""

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import grpc

from heterorl.v1 import weights_pb2
from services.runtime.backoff import set_within
from services.runtime.errors import HeteroRLError
from services.runtime.log import get_logger
from services.sampler.object_cache import ObjectCache
from services.sampler.weight_sources import WeightSources
from services.wire.convert import from_object
from services.wire.objects import MAX_CHUNK_BYTES
from services.wire.types import ObjectRef

_PATIENCE_S = 2.0
"""An expected object is waited for so long after the one before: where that is too short, the link is slow, and the way
of a question does not count."""
_ASIDE_S = 600.0
"""Such a link is not tried again for so long."""

_log = get_logger("sampler.weights")


@dataclass(slots=True, kw_only=True, eq=False)
class _Update:
    """What the learner is to send of the update from one base, and what of it came."""

    base_root: str
    known: frozenset[ObjectRef]
    """Named before the question was sent: these do not come."""
    came: set[str] = field(default_factory=set[str])
    order: dict[str, int] = field(default_factory=dict[str, int])
    """Of those that are waited for: they come in the order in which they are named."""
    reached: int = -1
    """Where in that order the learner is."""

    def wait_for(self, ref: ObjectRef) -> None:
        self.order.setdefault(ref.object_id, len(self.order))
        self._reach(ref)

    def take(self, ref: ObjectRef) -> None:
        self.came.add(ref.object_id)
        self._reach(ref)

    def _reach(self, ref: ObjectRef) -> None:
        if ref.object_id in self.came:
            self.reached = max(self.reached, self.order.get(ref.object_id, -1))

    def expects(self, ref: ObjectRef) -> bool:
        """Whether an object that is waited for is still to come."""
        sent = ref.size_bytes <= MAX_CHUNK_BYTES and ref not in self.known
        return sent and self.order[ref.object_id] > self.reached


class PushedObjects:
    """From the learner alone: with a relay, or several channels, objects are better fetched."""

    def __init__(self, sources: WeightSources, cache: ObjectCache, run_id: str) -> None:
        self._sources = sources
        self._cache = cache
        self._run_id = run_id
        self._update = _Update(base_root="", known=frozenset())
        self._following: asyncio.Task[None] | None = None
        self._sign = asyncio.Event()
        self._sign_s = 0.0
        self._not_before_s = float("-inf")

    async def follow(self, held_root: str, known: Collection[ObjectRef], most_bytes: int) -> None:
        """From now on takes objects of the update from `held_root`, but for those `known`; at most so many bytes."""
        if held_root == self._update.base_root and self._following is not None and not self._following.done():
            return
        await self.end()
        learner = self._sources.current
        if learner.is_relay or len(learner.readers) > 1 or time.monotonic() < self._not_before_s:
            return
        self._update = _Update(base_root=held_root, known=frozenset(known))
        self._following = asyncio.create_task(self._take(self._update, most_bytes))
        self._following.add_done_callback(_report)

    async def end(self) -> None:
        """Takes no more. What came stays on disk."""
        task, self._following = self._following, None
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def come(self, ref: ObjectRef) -> bool:
        """*Waits for* an object that the learner is to send; *produces* whether it is there; on False it is not going
        to be."""
        named_s = time.monotonic()
        task, update = self._following, self._update
        update.wait_for(ref)
        while task is not None and not task.done() and update.expects(ref):
            left_s = max(named_s, self._sign_s) + _PATIENCE_S - time.monotonic()
            if left_s <= 0:
                if not task.cancelling():
                    _log.info("pushed_objects_too_slow", aside_s=_ASIDE_S)
                    self._not_before_s = time.monotonic() + _ASIDE_S
                    task.cancel()
                break
            self._sign.clear()
            await set_within(self._sign, left_s)
        return ref.object_id in update.came

    async def _take(self, update: _Update, most_bytes: int) -> None:
        request = weights_pb2.FollowUpdateRequest(
            run_id=self._run_id, base_root=update.base_root, first=len(update.known)
        )
        call = self._sources.learner.stub.FollowUpdate(request, wait_for_ready=True)
        try:
            while isinstance(message := await call.read(), weights_pb2.FollowUpdateResponse):
                ref, data = from_object(message.object), message.data
                most_bytes -= len(data)
                if len(data) != ref.size_bytes or most_bytes < 0:
                    break
                await asyncio.to_thread(self._cache.put, ref, data)
                self._sources.received_bytes["learner"] += len(data)
                update.take(ref)
                self._sign_s = time.monotonic()
                self._sign.set()
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED):
                self._not_before_s = float("inf")  # a learner of an earlier build
        except HeteroRLError as error:
            _log.info("pushed_objects_dropped", error=error)
        finally:
            call.cancel()
            self._sign.set()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("pushed_objects_failed", error=error)

"""Upstream's plans, remembered: samplers of a site are mostly at the same version, and ask at the same moment.

A plan from one root to one version of one learner epoch stays right for as long as its objects can be had.
"""

import asyncio
from collections import OrderedDict
from typing import NamedTuple

from heterorl.v1 import weights_pb2
from services.relay.upstream import Upstream
from services.runtime.errors import BadInputError, MismatchError, UnavailableError
from services.wire.convert import from_plan
from services.wire.objects import is_object_id

_MOST = 256


class _Key(NamedTuple):
    epoch: int
    have_root: str
    want_version: int
    keyframe_only: bool


class PlanMemory:
    """Single flight per question."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._known: OrderedDict[_Key, weights_pb2.GetPlanResponse] = OrderedDict()
        self._asking: dict[_Key, asyncio.Task[weights_pb2.GetPlanResponse]] = {}
        self.answered_from_memory = 0

    def check_run(self, run_id: str) -> None:
        """Raises MismatchError when upstream is known to serve another run."""
        latest = self._upstream.latest
        if run_id and latest is not None and latest.decoded.run_id != run_id:
            raise MismatchError(
                f"this relay serves run {latest.decoded.run_id[:80]!r}, not {run_id[:80]!r}: check the address"
            )

    async def answer(self, request: weights_pb2.GetPlanRequest) -> weights_pb2.GetPlanResponse:
        """Raises what upstream raises; UnavailableError when it is away and the plan is not known; BadInputError for a
        root that is none: what is asked for is remembered."""
        self.check_run(request.run_id)
        if request.have_root and not is_object_id(request.have_root):
            raise BadInputError("the weights held are named by 64 lower-case hex digits, or by nothing")
        latest = self._upstream.latest
        if latest is None:
            return await self._ask(request)
        key = _Key(
            epoch=latest.decoded.learner_epoch,
            have_root=request.have_root,
            want_version=request.want_version or latest.decoded.version,
            keyframe_only=request.keyframe_only,
        )
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            self.answered_from_memory += 1
            return known
        task = self._asking.get(key)
        if task is None:
            forwarded = weights_pb2.GetPlanRequest()
            forwarded.CopyFrom(request)
            forwarded.want_version = key.want_version
            task = self._asking[key] = asyncio.create_task(self._learn(key, forwarded))
            task.add_done_callback(lambda done: self._asked(key, done))
        return await asyncio.shield(task)  # one that gives up does not take the answer from the others

    def forget(self, object_id: str) -> None:
        """Drops the plans that name an object which upstream no longer has."""
        for key, plan in list(self._known.items()):
            if any(ref.object_id == object_id for step in plan.steps for ref in step.objects):
                del self._known[key]

    async def close(self) -> None:
        """Ends questions under way."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _learn(self, key: _Key, request: weights_pb2.GetPlanRequest) -> weights_pb2.GetPlanResponse:
        answer = await self._ask(request)
        plan = from_plan(answer)
        self._upstream.note_sizes(ref for step in plan.steps for ref in step.objects)
        if plan.target.decoded.version == key.want_version:  # 0 asks for the newest, whichever it is by now
            self._known[key] = answer
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return answer

    async def _ask(self, request: weights_pb2.GetPlanRequest) -> weights_pb2.GetPlanResponse:
        try:
            return await self._upstream.plan(request)
        except UnavailableError as error:
            raise UnavailableError(f"upstream is away, and this plan is not known here: try again ({error})") from error

    def _asked(self, key: _Key, done: asyncio.Task[weights_pb2.GetPlanResponse]) -> None:
        self._asking.pop(key, None)
        if not done.cancelled():
            done.exception()  # nobody may be left to hear it

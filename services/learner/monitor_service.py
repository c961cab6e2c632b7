"""MonitorService: the state of the run, for whoever only looks."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc

from heterorl.v1 import monitor_pb2, monitor_pb2_grpc
from services.learner.records import Records
from services.learner.run_control import unless_set

_DEFAULT_INTERVAL_MS = 1000
_SHORTEST_INTERVAL_MS = 100

_Get = grpc.aio.ServicerContext[monitor_pb2.GetStatusRequest, monitor_pb2.GetStatusResponse]
_Watch = grpc.aio.ServicerContext[monitor_pb2.WatchStatusRequest, monitor_pb2.WatchStatusResponse]
_Steps = grpc.aio.ServicerContext[monitor_pb2.WatchStepsRequest, monitor_pb2.WatchStepsResponse]


class MonitorService(monitor_pb2_grpc.MonitorServiceServicer):
    """`status` builds the state of this moment; it must be quick. When `drain` is set the streams end."""

    def __init__(self, status: Callable[[], monitor_pb2.RunStatus], records: Records, drain: asyncio.Event) -> None:
        self._status = status
        self._records = records
        self._drain = drain

    async def GetStatus(self, request: monitor_pb2.GetStatusRequest, context: _Get) -> monitor_pb2.GetStatusResponse:
        return monitor_pb2.GetStatusResponse(status=self._status())

    async def WatchStatus(
        self, request: monitor_pb2.WatchStatusRequest, context: _Watch
    ) -> AsyncIterator[monitor_pb2.WatchStatusResponse]:
        """*Waits for* the interval (the state holds ages, so it always changes); *produces* the state of that moment;
        a slow watcher gets fewer of them; ends with the last state when the learner drains; *on cancel* nothing is
        lost."""
        interval_ms = max(_SHORTEST_INTERVAL_MS, request.interval_ms or _DEFAULT_INTERVAL_MS)
        while not self._drain.is_set():
            yield monitor_pb2.WatchStatusResponse(status=self._status())
            await unless_set(self._drain, asyncio.sleep(interval_ms / 1000))
        yield monitor_pb2.WatchStatusResponse(status=self._status())

    async def WatchSteps(
        self, request: monitor_pb2.WatchStepsRequest, context: _Steps
    ) -> AsyncIterator[monitor_pb2.WatchStepsResponse]:
        """*Waits for* records; *produces* the recorded ones from the asked step on, then new ones as they come;
        ends when the learner drains; *on cancel* nothing is lost."""
        records = self._records.follow(request.from_step)
        while (record := await unless_set(self._drain, anext(records))) is not None:
            yield monitor_pb2.WatchStepsResponse(step=record.step, metrics=record.metrics, wall_s=record.wall_s)

"""`heterorl top` where there is no terminal to draw on."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from heterorl.v1 import monitor_pb2, monitor_pb2_grpc
from services.monitor.top import watch


class ThreeSteps(monitor_pb2_grpc.MonitorServiceServicer):
    async def GetStatus(
        self, request: monitor_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> monitor_pb2.GetStatusResponse:
        return monitor_pb2.GetStatusResponse()

    async def WatchStatus(
        self, request: monitor_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[monitor_pb2.WatchStatusResponse]:
        for step in (7, 8, 9):
            yield monitor_pb2.WatchStatusResponse(status=monitor_pb2.RunStatus(run_id=f"run at {step}", step=step))


@asynccontextmanager
async def learner() -> AsyncIterator[str]:
    server = grpc.aio.server()
    monitor_pb2_grpc.add_MonitorServiceServicer_to_server(ThreeSteps(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_views_stand_below_each_other_where_none_can_replace_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # of many CI systems: rich then takes a pipe for a terminal
    async with learner() as target:
        await watch(target, None, 1.0, as_json=False)
    out = capsys.readouterr().out
    assert [step for step in (7, 8, 9) if f"run at {step}" in out] == [7, 8, 9]
    assert "\x1b[?1049h" not in out


async def test_as_json_a_view_is_a_line(capsys: pytest.CaptureFixture[str]):
    async with learner() as target:
        await watch(target, None, 1.0, as_json=True)
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == ["7", "8", "9"]

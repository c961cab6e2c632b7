import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from heterorl.v1 import control_pb2
from heterorl.v1.control_pb2_grpc import ControlServiceStub
from services.runtime.address import Address
from services.runtime.errors import (
    DiskFullError,
    FencedError,
    HeteroRLError,
    MismatchError,
    SessionLostError,
    StorageError,
    UnavailableError,
)
from services.sampler.session import LearnerSession
from services.sampler.spool import Spool
from services.wire.channel import open_channel
from services.wire.convert import to_session
from services.wire.types import ROOT_IN_LAST_PART, GraderSpec, Session
from tests.support.scripted_learner import RUN_ID, SETTINGS, ScriptedControl, Served, registered, serving


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[Spool]:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    yield spool
    await spool.close()


def heartbeat(channel: grpc.aio.Channel) -> "object":
    """A call for LearnerSession.call."""
    stub = ControlServiceStub(channel)
    return lambda session: stub.Heartbeat(control_pb2.HeartbeatRequest(session=to_session(session)), timeout=5)


async def test_registering_binds_the_spool_to_the_run(spool: Spool) -> None:
    async with serving() as served:
        session = await registered(served, spool)
    assert spool.run_id == RUN_ID
    assert session.session == Session(run_id=RUN_ID, sampler_id="sampler-1", learner_epoch=1, session_epoch=1)
    assert served.control.features == [ROOT_IN_LAST_PART]


async def test_a_lost_session_is_renewed_once_however_many_calls_find_out(spool: Spool) -> None:
    async with serving() as served:
        session = await registered(served, spool)
        served.control.heartbeat_errors = [SessionLostError("the learner restarted")] * 3
        send = heartbeat(served.channel)
        outcomes = await asyncio.gather(*(session.call(send) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)
        assert served.control.registrations == 2
        await session.call(send)
        assert session.session.session_epoch == 2


@pytest.mark.parametrize("fault", [DiskFullError("disk full"), StorageError("EIO"), HeteroRLError("internal error 1")])
async def test_a_fault_of_the_learner_is_waited_out_like_its_absence(spool: Spool, fault: HeteroRLError) -> None:
    async with serving() as served:
        session = await registered(served, spool)
        served.control.heartbeat_errors = [fault]
        with pytest.raises(UnavailableError, match="the peer has a fault"):
            await session.call(heartbeat(served.channel))
        await session.call(heartbeat(served.channel))


async def test_a_fenced_session_is_not_renewed(spool: Spool) -> None:
    async with serving() as served:
        session = await registered(served, spool)
        served.control.heartbeat_errors = [FencedError("a newer process took over")]
        with pytest.raises(FencedError, match="newer process"):
            await session.call(heartbeat(served.channel))
        assert served.control.registrations == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_files_sha256": "cd" * 32}, "model or tokenizer"),
        ({"manifest_public_key": b"k" * 32}, "signing key"),
        ({"graders": (GraderSpec(name="math"),), "system_prompt": "Think."}, "graders and system prompt"),
        ({"max_staleness": 1, "group_size": 8}, None),
    ],
)
async def test_a_learner_that_comes_back_with_settings_that_are_built_in_here_asks_for_a_new_process(
    spool: Spool, changes: dict[str, Any], named: str | None
) -> None:
    async with serving() as served:
        session = await registered(served, spool)
        served.control.settings = replace(SETTINGS, **changes)
        served.control.heartbeat_errors = [SessionLostError("the learner restarted")]
        if named is None:
            with pytest.raises(UnavailableError, match="renewed"):
                await session.call(heartbeat(served.channel))
            assert session.settings.group_size == 8
        else:
            with pytest.raises(SessionLostError, match=f"the learner's {named} changed"):
                await session.call(heartbeat(served.channel))


async def test_an_absent_learner_is_tried_again_until_patience_ends(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = Address(host="127.0.0.1", port=1)
    channel = open_channel(nobody, None, "control")
    session = LearnerSession(
        control=ControlServiceStub(channel),
        learner=nobody,
        sampler_id="sampler-1",
        spool=spool,
        engine=lambda: None,
        give_up_s=8.0,  # at least two tries: gRPC's own retries of one call take up to 4 s
        draw=lambda: 0.5,
    )
    with caplog.at_level("WARNING", logger="heterorl"), pytest.raises(UnavailableError, match="has not answered for"):
        await session.register()
    await channel.close()
    *tries, last = [record.getMessage() for record in caplog.records]
    assert tries
    assert all("learner 127.0.0.1:1 does not answer, next try in" in line for line in tries)
    assert last == "learner 127.0.0.1:1 does not answer, patience has ended"


async def test_a_relay_where_the_learner_should_be_is_named(spool: Spool) -> None:
    server = grpc.aio.server()
    address = Address(host="127.0.0.1", port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    async with open_channel(address, None, "control") as channel:
        served = Served(address=address, channel=channel, control=ScriptedControl())
        with pytest.raises(MismatchError, match=f"127.0.0.1:{address.port} answers, and is no learner .* a relay"):
            await registered(served, spool)
    await server.stop(0)

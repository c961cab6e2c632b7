"""What the log says of a learner that is silent, or was."""

import asyncio
import logging
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from heterorl.v1.control_pb2_grpc import ControlServiceStub
from services.runtime.address import Address
from services.runtime.errors import SessionLostError
from services.sampler.heartbeat import Heartbeat
from services.sampler.session import LearnerSession
from services.sampler.spool import Spool
from services.sampler.tally import Tally
from services.wire.channel import open_channel
from tests.support.scripted_learner import registered, serving


def heartbeat_of(channel: grpc.aio.Channel, session: LearnerSession, spool: Spool, **changes: Any) -> Heartbeat:
    return Heartbeat(
        control=ControlServiceStub(channel),
        session=session,
        follower=cast(Any, SimpleNamespace(version=0, root="")),
        spool=spool,
        tally=Tally(),
        engine=cast(Any, SimpleNamespace(info=None, restarts=0)),
        drain=lambda: None,
        news=asyncio.Event(),
        **changes,
    )


async def test_a_learner_that_restarted_is_not_called_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "heterorl")
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    async with serving() as served:
        heartbeat = heartbeat_of(served.channel, await registered(served, spool), spool)
        served.control.heartbeat_errors = [SessionLostError("the learner restarted")]
        await heartbeat.beat()
        assert served.control.registrations == 2
        await heartbeat.beat()
    assert [record.message for record in caplog.records] == []
    await spool.close()


async def test_a_learner_that_stays_silent_is_told_of_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "heterorl")
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = Address(host="127.0.0.1", port=taken.getsockname()[1])
    now_s = 100.0
    async with serving() as served, open_channel(nobody, None, "control") as channel:
        session = await registered(served, spool)
        heartbeat = heartbeat_of(channel, session, spool, clock=lambda: now_s)

        async def told() -> list[str]:
            caplog.clear()
            await heartbeat.beat()
            return [str(record.__dict__["heterorl_facts"]["error"]) for record in caplog.records]

        assert len(await told()) == 1
        assert await told() == []
        now_s += 31.0
        (reason,) = await told()
        assert "Connection refused" in reason
        assert await told() == []
        now_s += 61.0
        assert len(await told()) == 1
    await spool.close()

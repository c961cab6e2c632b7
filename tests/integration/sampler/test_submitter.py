import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest

from heterorl.v1 import control_pb2
from heterorl.v1.control_pb2_grpc import ControlServiceStub
from heterorl.v1.rollouts_pb2_grpc import RolloutServiceStub
from services.runtime import failpoints
from services.runtime.backoff import Backoff
from services.sampler.session import LearnerSession
from services.sampler.spool import Spool
from services.sampler.submitter import Submitter
from services.sampler.tally import Tally
from services.wire.channel import open_channel
from services.wire.convert import encode_group, from_lease, to_session
from services.wire.identity import Identity, Role
from tests.integration.learner.learner_of_tests import LearnerOfTests, running_learner
from tests.support.data_side import group_for, root
from tests.support.scripted_learner import ScriptedRollouts, Served, registered, serving


@asynccontextmanager
async def submitting(served: Served, spool: Spool, acknowledged: list[int]) -> AsyncIterator[Tally]:
    async with submitting_on(served.channel, await registered(served, spool), spool, acknowledged) as tally:
        yield tally


@asynccontextmanager
async def submitting_on(
    channel: grpc.aio.Channel, session: LearnerSession, spool: Spool, acknowledged: list[int]
) -> AsyncIterator[Tally]:
    tally = Tally()
    submitter = Submitter(
        spool=spool,
        rollouts=RolloutServiceStub(channel),
        session=session,
        tally=tally,
        acknowledged=acknowledged.append,
        backoff=Backoff(uniform=lambda _, longest: 0.02 * longest),
    )
    task = asyncio.create_task(submitter.run())
    try:
        yield tally
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def fill(spool: Spool, first: int, count: int, size: int = 10) -> list[bytes]:
    payloads = [b"%0*d" % (size, index) for index in range(first, first + count)]
    for payload in payloads:
        await spool.append(payload)
    return payloads


@pytest.mark.parametrize("cuts", [[], [1], [3, 1, 7], [5, 5, 5, 1, 1]])
async def test_every_group_arrives_exactly_once_whatever_is_cut(tmp_path: Path, cuts: list[int]) -> None:
    rollouts = ScriptedRollouts(cuts=list(cuts))
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    acknowledged: list[int] = []
    async with serving(rollouts=rollouts) as served, submitting(served, spool, acknowledged) as tally:
        sent = await fill(spool, 0, 10)
        async with asyncio.timeout(10):
            await spool.empty.wait()
            sent += await fill(spool, 10, 20)
            await spool.empty.wait()
        assert rollouts.journal == sent
        assert rollouts.streams == len(cuts) + 1
        assert acknowledged[-1] == 30
        # Groups that were committed without an Ack: the next stream's Welcome covers them, so none is sent again.
        assert rollouts.duplicates == 0
        assert tally.verdicts["accepted"] <= 30 - len(cuts)
    await spool.close()


async def test_groups_wait_for_credit_and_one_larger_than_all_credit_goes_alone(tmp_path: Path) -> None:
    rollouts = ScriptedRollouts(credit_bytes=100)
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    async with serving(rollouts=rollouts) as served, submitting(served, spool, []):
        sent = [*await fill(spool, 0, 5, 40), *await fill(spool, 5, 2, 500), *await fill(spool, 7, 3, 99)]
        async with asyncio.timeout(10):
            await spool.empty.wait()
        assert rollouts.journal == sent
    await spool.close()


async def test_an_acknowledgement_of_what_was_never_sent_deletes_nothing(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    rollouts = ScriptedRollouts(credit_bytes=10, ack_beyond=2)
    async with serving(rollouts=rollouts) as served, submitting(served, spool, []):
        payloads = await fill(spool, 0, 3)
        async with asyncio.timeout(10):
            await spool.empty.wait()
    assert rollouts.journal == payloads
    await spool.close()


async def test_what_a_full_disk_could_not_forget_is_forgotten_without_another_acknowledgement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sampler.submitter.RETRY_S", 0.05)
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    rollouts = ScriptedRollouts()
    failpoints.arm("spool.before_delete_commit=3*error(DiskFullError)->off")
    try:
        async with serving(rollouts=rollouts) as served, submitting(served, spool, []):
            sent = await fill(spool, 0, 1)
            async with asyncio.timeout(10):
                await spool.empty.wait()
    finally:
        failpoints.arm("")
    assert rollouts.journal == sent
    assert rollouts.streams == 1
    await spool.close()


async def test_nothing_leaves_the_spool_while_the_learner_is_away(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    rollouts = ScriptedRollouts()
    async with serving(rollouts=rollouts) as served:
        await registered(served, spool)
        await fill(spool, 0, 4)
    assert spool.groups == 4
    async with serving(rollouts=rollouts) as served, submitting(served, spool, []):
        async with asyncio.timeout(10):
            await spool.empty.wait()
    assert len(rollouts.journal) == 4
    await spool.close()


async def test_a_learner_that_lost_acknowledged_groups_gets_the_rest_as_a_new_spool(tmp_path: Path) -> None:
    rollouts = ScriptedRollouts()
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    async with serving(rollouts=rollouts) as served, submitting(served, spool, []):
        await fill(spool, 0, 5)
        async with asyncio.timeout(10):
            await spool.empty.wait()
    rollouts.journal.clear()  # restored from an older copy
    sent = await fill(spool, 5, 3)
    old_id = spool.spool_id
    async with serving(rollouts=rollouts) as served, submitting(served, spool, []):
        async with asyncio.timeout(10):
            await spool.empty.wait()
    assert spool.spool_id != old_id
    assert rollouts.journal == sent
    await spool.close()


async def work(learner: LearnerOfTests, spool: Spool, count: int) -> Tally:
    """A sampler's life with a real learner: registers, answers `count` leases, and ends when its spool is empty."""
    await learner.plane.advance(0, root(0))
    channel = open_channel(learner.address, None, "control", Identity(role=Role.SAMPLER, id="sampler-1"))
    control = ControlServiceStub(channel)
    session = LearnerSession(
        control=control,
        learner=learner.address,
        sampler_id="sampler-1",
        spool=spool,
        engine=lambda: None,
        give_up_s=0.0,
    )
    await session.register()
    async with submitting_on(channel, session, spool, []) as tally:
        request = control_pb2.LeasePromptsRequest(session=to_session(session.session), max_leases=count, wait_ms=1000)
        leases = (await control.LeasePrompts(request, timeout=10)).leases
        assert len(leases) == count
        for lease in leases:
            await spool.append(encode_group(group_for(from_lease(lease))))
        async with asyncio.timeout(10):
            await spool.empty.wait()
    await channel.close()
    return tally


async def test_a_learner_that_lost_its_journal_accepts_new_groups_though_the_spool_was_empty(tmp_path: Path) -> None:
    spool = await Spool.open(tmp_path / "spool.db", 1 << 20)
    for state in ("first", "second"):
        (tmp_path / state).mkdir()
        async with running_learner(tmp_path / state) as learner:
            tally = await work(learner, spool, 3)
            assert tally.verdicts == {"accepted": 3}
            assert len(learner.plane.buffer) == 3
    await spool.close()


async def test_a_spool_restored_from_an_older_copy_does_not_reuse_numbers_that_the_learner_knows(
    tmp_path: Path,
) -> None:
    async with running_learner(tmp_path) as learner:
        for name in ("spool.db", "older-copy.db"):  # an empty spool is older than any other; its id is the same
            spool = await Spool.open(tmp_path / name, 1 << 20)
            spool._file.spool_id = "the-same"
            tally = await work(learner, spool, 2)
            assert tally.verdicts == {"accepted": 2}
            await spool.close()
        assert len(learner.plane.buffer) == 4

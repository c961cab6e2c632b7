"""From restore to batch on a real journal, without a server."""

import asyncio
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.learner.data_plane import JOURNAL_FILE, DataPlane
from services.learner.intake import Arrival, Gap
from services.runtime import failpoints
from services.runtime.errors import BadInputError, ConfigError, StorageError
from services.wire.types import Verdict, VerdictCode
from tests.support.data_side import Clock, dataset, envelope, group_for, open_plane, root, settings
from tests.support.running_plane import Running


async def test_steps_trained_after_the_checkpoint_are_trained_again_with_the_same_groups(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        await run.answer(*await run.lease(4))
        first = await run.plane.take_batch(2, 0)
        await run.plane.mark_trained(first, 1)
        await run.plane.advance(1, root(1))
        saved = run.plane.state(1)
        second = await run.plane.take_batch(2, 1)
        await run.plane.mark_trained(second, 2)
        await run.plane.advance(2, root(2))
        await run.answer(*await run.lease(1, version=2), version=2)
    plane = await DataPlane.open(tmp_path, settings(), dataset(tmp_path), Clock())
    await plane.restore(saved)
    async with Running(plane) as run:
        assert (plane.learner_epoch, plane.learner_version) == (2, 1)
        assert plane.tally.dropped == {"FUTURE_VERSION": 1}
        await plane.advance(1, root(1))
        again = await plane.take_batch(2, 1)
        assert again.ids == second.ids
        assert [group.staleness for group in again.groups] == [1, 1]
        await plane.mark_trained(again, 2)
        assert (plane.tally.trained, plane.tally.acknowledged, len(plane.buffer)) == (4, 5, 0)


async def test_prompts_whose_groups_a_restore_drops_are_granted_again_before_new_ones(tmp_path: Path) -> None:
    """Trained after the checkpoint, by versions that are no more: the run would go on without a part of its data."""
    async with Running(await open_plane(tmp_path)) as run:
        saved = {**run.plane.state(0), "version": 0, "root": root(0)}
        for step in range(2):
            await run.plane.advance(step, root(step))
            await run.answer(*await run.lease(2, version=step), version=step)
            await run.plane.mark_trained(await run.plane.take_batch(2, step), step + 1)
        await run.plane.advance(2, root(2))
        assert [lease.lease_id for lease in await run.lease(2, version=2)] == ["1-t4-1", "1-t5-1"]
    for first in ("2-t2-1", "3-t2-1", "4-t3-1"):
        clock = Clock()
        plane = await DataPlane.open(tmp_path, settings(), dataset(tmp_path), clock)
        await plane.restore(saved)
        clock.advance(60.0)  # nobody goes on with the prompts that were out
        async with Running(plane) as run:
            assert plane.tally.dropped == {"FUTURE_VERSION": 2}
            await plane.advance(0, root(0))
            (lease,) = await run.lease(1)
            assert lease.lease_id == first
            if first == "3-t2-1":
                await run.answer(lease)


async def test_a_prompt_that_was_answered_anew_since_the_checkpoint_is_not_trained_twice(tmp_path: Path) -> None:
    online = settings(max_staleness=0)
    async with Running(await open_plane(tmp_path, online)) as run:
        plane = run.plane
        await plane.advance(0, root(0))
        await run.answer(*await run.lease(2))
        await plane.advance(1, root(1))
        saved = plane.state(0)
        taking = asyncio.create_task(plane.take_batch(2, 1))
        async with asyncio.timeout(5):
            while not (again := await run.lease(2, version=1)):
                await plane.leases.wait_for_change(0.1)
            await run.answer(*again)
            batch = await taking
        await plane.mark_trained(batch, 1)
    plane = await DataPlane.open(tmp_path, online, dataset(tmp_path), Clock())
    await plane.restore(saved)
    async with Running(plane) as run:
        await plane.advance(1, root(1))
        assert (await plane.take_batch(2, 1)).ids == batch.ids
        await plane.mark_trained(batch, 1)
        await plane.advance(2, root(2))
        assert [lease.lease_id for lease in await run.lease(2, version=2)] == ["2-t2-1", "2-t3-1"]
        assert plane.tally.dropped == {"STALE_IN_BUFFER": 2}


async def test_a_checkpoint_of_another_data_set_or_version_of_other_weights_is_refused(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        saved = run.plane.state(0)
    plane = await DataPlane.open(tmp_path, settings(), dataset(tmp_path, prompts=3), Clock())
    async with Running(plane):
        with pytest.raises(ConfigError, match="has changed"):
            await plane.restore(saved)
        with pytest.raises(ConfigError, match="state_dir"):
            await plane.advance(0, root(9))


async def test_a_data_set_of_which_samplers_can_use_no_prompt_ends_the_run(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        while leases := await run.lease(4):
            assert not run.task.done()
            run.plane.leases.release("eu-1", [lease.lease_id for lease in leases], "prompt_too_long")
        with pytest.raises(BadInputError, match=r"samplers can use no prompt of .*max_prompt_tokens"):
            await run.task


async def test_a_sampler_that_is_gone_for_good_does_not_keep_such_a_run_going(tmp_path: Path) -> None:
    clock = Clock()
    async with Running(await open_plane(tmp_path, clock=clock)) as run, asyncio.timeout(10):
        await run.plane.advance(0, root(0))
        await run.plane.sessions.register("eu-2")
        clock.advance(3600.0)
        while leases := await run.lease(4):
            run.plane.leases.release("eu-1", [lease.lease_id for lease in leases], "prompt_too_long")
        with pytest.raises(BadInputError, match="samplers can use no prompt"):
            await run.task


async def test_stale_groups_are_dropped_at_the_step_and_their_prompts_granted_again(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path, settings(max_staleness=0))) as run:
        plane = run.plane
        await plane.advance(0, root(0))
        leases = await run.lease(2)
        await run.answer(*leases)
        await plane.advance(1, root(1))
        taking = asyncio.create_task(plane.take_batch(2, 1))
        async with asyncio.timeout(5):
            while not (again := await run.lease(2, version=1)):
                await plane.leases.wait_for_change(0.1)
        assert [lease.prompt for lease in again] == [lease.prompt for lease in leases]
        await run.answer(*again)
        async with asyncio.timeout(5):
            batch = await taking
        assert [group.staleness for group in batch.groups] == [0, 0]
        assert plane.tally.dropped == {"STALE_IN_BUFFER": 2}


async def test_the_step_under_way_keeps_its_place_until_its_version_is_out(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path, settings(max_staleness=0))) as run:
        await run.plane.advance(0, root(0))
        await run.answer(*await run.lease(2))
        batch = await run.plane.take_batch(2, 0)
        assert (run.plane.waiting, await run.lease(1)) == (2, [])
        await run.plane.mark_trained(batch, 1)
        assert await run.lease(1) == []
        await run.plane.advance(1, root(1))
        assert len(await run.lease(5, version=1)) == 2


async def test_a_group_on_its_way_to_the_disk_keeps_its_place(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path, settings(max_staleness=0))) as run:
        await run.plane.advance(0, root(0))
        leases = await run.lease(2)
        failpoints.arm("journal.before_commit=1*delay(300)->off")
        try:
            answering = asyncio.create_task(run.answer(leases[0]))
            async with asyncio.timeout(5):
                while run.plane.leases.active == 2:
                    await run.plane.leases.wait_for_change(0.01)
            assert (run.plane.waiting, len(run.plane.buffer)) == (1, 0)
            assert await run.lease(1) == []
            await answering
        finally:
            failpoints.arm("")
        assert (run.plane.waiting, len(run.plane.buffer)) == (1, 1)


async def test_a_batch_whose_step_was_not_applied_is_dropped_with_its_reason(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path, settings(max_staleness=0))) as run:
        await run.plane.advance(0, root(0))
        await run.answer(*await run.lease(2))
        batch = await run.plane.take_batch(2, 0)
        await run.plane.drop_batch(batch, "NOT_FINITE", 1)
        assert run.plane.tally.dropped == {"NOT_FINITE": 2}
        assert len(await run.lease(5)) == 2


async def test_a_failed_commit_acknowledges_nothing_and_the_same_groups_come_again(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        lease = (await run.lease(1))[0]
        sent = envelope(1, group_for(lease))
        failpoints.arm("journal.before_commit=1*error->off")
        try:
            with pytest.raises(StorageError):
                await run.submit(sent)
        finally:
            failpoints.arm("")
        assert (run.plane.tally.acknowledged, run.plane.waiting) == (0, 0)
        assert await run.submit(envelope(2, b"")) == Gap(expected_seq=1)
        verdict = await run.submit(sent)
        assert isinstance(verdict, Verdict)
        assert verdict.code is VerdictCode.ACCEPTED


async def test_a_fault_that_is_not_a_full_disk_ends_the_process(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        sent = envelope(1, group_for((await run.lease(1))[0]))
        failpoints.arm("journal.after_commit=error")
        try:
            with pytest.raises(StorageError):
                await run.submit(sent)
            with pytest.raises(StorageError):
                await run.task
        finally:
            failpoints.arm("")
    async with Running(await open_plane(tmp_path)) as run:
        verdict = await run.submit(sent)
        assert isinstance(verdict, Verdict)
        assert (verdict.code, verdict.first) == (VerdictCode.DUPLICATE, VerdictCode.ACCEPTED)
        assert len(run.plane.buffer) == 1


async def test_copies_in_one_transaction_are_told_apart(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        first, second = await run.lease(2)
        sent = [
            envelope(1, group_for(first), "a"),
            envelope(1, group_for(first), "a"),
            envelope(2, group_for(first), "a"),
            envelope(3, group_for(first, reward=0.0), "a"),
            envelope(4, group_for(first), "b"),
            envelope(5, group_for(second), "c"),
            envelope(7, group_for(second), "d"),
        ]
        arrivals = [Arrival(sampler_id="eu-1", session_epoch=1, spool_id="spool", envelope=one) for one in sent]
        futures = [await run.plane.intake.submit(arrival) for arrival in arrivals]
        outcomes = await asyncio.gather(*futures)
        codes = [outcome.code.name if isinstance(outcome, Verdict) else outcome for outcome in outcomes]
        assert codes == [
            "ACCEPTED",
            "DUPLICATE",
            "DUPLICATE",
            "INVALID",
            "LEASE_LOST",
            "ACCEPTED",
            Gap(expected_seq=6),
        ]
        tally = run.plane.tally
        assert (tally.acknowledged, tally.duplicates, len(run.plane.buffer)) == (4, 2, 2)
        assert tally.buffered == 2


async def test_a_sampler_that_sends_only_rubbish_is_quarantined_until_it_registers_again(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        lease = (await run.lease(1))[0]
        for seq in range(1, 9):
            await run.submit(envelope(seq, b"\xff"))
        verdict = await run.submit(envelope(9, group_for(lease)))
        assert isinstance(verdict, Verdict)
        assert verdict.code is VerdictCode.QUARANTINED
        (sampler,) = run.plane.sessions.all()
        assert (sampler.quarantined, sampler.invalid_for) == (True, "DOES_NOT_PARSE")
        await run.plane.sessions.register("eu-1")
        assert not sampler.quarantined
        run.seq = 9
        await run.answer((await run.lease(1))[0])


async def test_a_cancelled_take_batch_keeps_the_groups(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        await run.answer(*await run.lease(2))
        gate = threading.Event()
        executor = ThreadPoolExecutor(1)  # held by the gate: no batch can be decoded before its task is cancelled
        asyncio.get_running_loop().set_default_executor(executor)
        executor.submit(gate.wait)
        for turns in range(4):
            taking = asyncio.create_task(run.plane.take_batch(2, 0))
            for _ in range(turns):
                await asyncio.sleep(0)
            taking.cancel()
            await asyncio.wait([taking])
            assert taking.cancelled()
            assert run.plane.waiting == 2
        gate.set()
        assert len((await run.plane.take_batch(2, 0)).ids) == 2


async def test_an_evaluation_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        started = await run.plane.evaluate(dataset(tmp_path).prompts[:2], 1)
        leases = await run.lease(1)
        run.plane.evaluation.cancel(started)
        assert run.plane.leases.active == 0
        verdict = await run.submit(envelope(1, group_for(leases[0])))
        assert isinstance(verdict, Verdict)
        assert verdict.code is VerdictCode.LEASE_LOST
        with sqlite3.connect(tmp_path / JOURNAL_FILE) as raw:  # refused groups without end must not fill the disk
            assert raw.execute("SELECT verdict, LENGTH(payload) FROM groups").fetchall() == [(verdict.code.value, 0)]
        raw.close()
        empty = await (await run.plane.evaluate((), 1)).result()
        assert (empty.round, empty.prompts) == (2, 0)

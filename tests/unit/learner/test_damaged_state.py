"""A journal that was damaged, lost, or put back from an older copy: what it says is never trained on by mistake."""

import asyncio
import math
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from services.learner.admission import Standing
from services.learner.data_plane import JOURNAL_FILE, DataPlane
from services.learner.data_settings import DataSettings
from services.learner.records import EVAL_ROUND, Record
from services.learner.run_state import EvalPoint, RunState
from services.runtime.errors import StorageError
from services.wire.types import Verdict, VerdictCode
from tests.support.data_side import GROUP_SIZE, Clock, dataset, envelope, group_for, open_plane, root, settings
from tests.support.running_plane import Running


async def plane_again(
    folder: Path, state: dict[str, int | str] | None = None, known_epoch: int = 0, given: DataSettings | None = None
) -> DataPlane:
    plane = await DataPlane.open(folder, given or settings(), dataset(folder), Clock(), known_epoch=known_epoch)
    await plane.restore(state)
    return plane


async def test_a_group_whose_bytes_changed_on_the_disk_is_dropped_and_its_prompt_granted_again(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        leases = await run.lease(3)
        await run.answer(*leases)
    with sqlite3.connect(tmp_path / JOURNAL_FILE) as raw:
        (payload,) = raw.execute("SELECT payload FROM groups WHERE id = 2").fetchone()
        changed = bytes((*payload[:-9], payload[-9] ^ 1, *payload[-8:]))
        raw.execute("UPDATE groups SET payload = ? WHERE id = 2", (changed,))
    raw.close()
    async with Running(await plane_again(tmp_path)) as run:
        assert run.plane.tally.dropped == {"DAMAGED": 1}
        await run.plane.advance(0, root(0))
        assert (await run.plane.take_batch(2, 0)).ids == (1, 3)
        assert run.plane.leases.facts(leases[1].lease_id, "eu-1").standing is Standing.OPEN


async def test_groups_of_a_journal_older_than_the_checkpoint_are_not_trained_a_second_time(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        await run.answer(*await run.lease(2))
        state = {**run.plane.state(1), "version": 1, "root": root(1)}  # of a step that this copy of the journal misses
    async with Running(await plane_again(tmp_path, state)) as run:
        assert (run.plane.tally.dropped, len(run.plane.buffer)) == ({"OLDER_JOURNAL": 2}, 0)
        await run.plane.advance(1, root(1))
        run.seq = 2
        await run.answer(*await run.lease(1, version=1), version=1)


async def test_a_new_journal_beside_old_versions_does_not_count_epochs_anew(tmp_path: Path) -> None:
    plane = await plane_again(tmp_path, known_epoch=7)
    assert plane.learner_epoch == 8
    await plane.close()


def test_evaluations_that_a_new_journal_numbered_anew_are_not_taken_for_those_of_the_checkpoint() -> None:
    state = RunState()
    state.evals = [EvalPoint(round=n, policy_version=10 * n, accuracy=0.5, prompts=4, wall_s=n) for n in (1, 2)]
    metrics = {"accuracy": 0.5, "eval_prompts": 4.0}
    state.add_evals(Record(step=step, wall_s=9.0, metrics={**metrics, EVAL_ROUND: n}) for step, n in ((20, 2), (30, 1)))
    assert [(point.policy_version, point.round) for point in state.evals] == [(10, 1), (20, 2), (30, 1)]


async def test_a_journal_that_fails_in_any_call_ends_the_process(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        with sqlite3.connect(tmp_path / JOURNAL_FILE) as raw:
            raw.execute("DROP TABLE sessions")
        raw.close()
        with pytest.raises(StorageError, match="no such table"):
            await run.plane.sessions.register("eu-2")
        async with asyncio.timeout(5):
            with pytest.raises(StorageError):
                await run.task


async def test_no_group_id_can_collide_with_the_journals_own(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        lease = (await run.lease(1))[0]
        verdicts = [
            await run.submit(envelope(1, group_for(lease), "!spool:2")),
            await run.submit(envelope(2, group_for(lease), "\x01")),
            await run.submit(envelope(3, group_for(lease), "good")),
        ]
        assert [verdict.reason for verdict in verdicts if isinstance(verdict, Verdict)] == ["BAD_GROUP_ID"] * 2 + [""]


@pytest.mark.parametrize("epoch", [3, 9])
async def test_what_a_restored_learner_forgot_puts_no_sampler_into_quarantine(tmp_path: Path, epoch: int) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        unknown = group_for((await run.lease(1))[0])
    async with Running(await plane_again(tmp_path, known_epoch=4)) as run:
        await run.plane.advance(0, root(0))
        for seq in range(1, 10):
            old = envelope(seq, replace(unknown, lease_id=f"{epoch}-t{100 + seq}-1"))
            verdict = await run.submit(old)
            assert isinstance(verdict, Verdict)
            assert (verdict.code, verdict.reason) == (VerdictCode.INVALID, "NEVER_LEASED")
        run.seq = 9
        await run.answer(*await run.lease(1))


async def test_an_old_lease_excuses_no_rubbish(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        group = group_for((await run.lease(1))[0])
    async with Running(await plane_again(tmp_path, known_epoch=4)) as run:
        await run.plane.advance(0, root(0))
        nan = tuple(replace(one, reward=math.nan) for one in group.completions)
        for seq in range(1, 9):
            await run.submit(envelope(seq, replace(group, lease_id=f"3-t{seq}-1", completions=nan)))
        verdict = await run.submit(envelope(9, group_for((await run.lease(1))[0])))
        assert isinstance(verdict, Verdict)
        assert verdict.code is VerdictCode.QUARANTINED


def other_settings() -> DataSettings:
    """Those of a learner that was started again with another temperature and another group size."""
    given = settings()
    return replace(
        given, form=replace(given.form, temperature=0.5), leases=replace(given.leases, group_size=GROUP_SIZE + 1)
    )


async def test_groups_that_other_settings_drew_are_not_trained_after_a_restart(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        leases = await run.lease(2)
        await run.answer(*leases)
    async with Running(await plane_again(tmp_path, given=other_settings())) as run:
        assert (run.plane.tally.dropped, len(run.plane.buffer)) == ({"OTHER_SETTINGS": 2}, 0)
        assert run.plane.leases.facts(leases[0].lease_id, "eu-1").standing is Standing.OPEN


async def test_groups_on_their_way_when_the_settings_changed_put_no_sampler_into_quarantine(tmp_path: Path) -> None:
    given = settings(groups_per_step=10)
    async with Running(await open_plane(tmp_path, given)) as run:
        await run.plane.advance(0, root(0))
        held = [group_for(lease) for lease in await run.lease(10)]
    changed = replace(other_settings(), pacing=given.pacing)
    async with Running(await plane_again(tmp_path, given=changed)) as run:
        await run.plane.advance(0, root(0))
        for seq, group in enumerate(held, 1):
            size_only = replace(group, temperature=0.5) if seq % 2 else group
            verdict = await run.submit(envelope(seq, size_only))
            assert isinstance(verdict, Verdict)
            assert verdict.reason == ("WRONG_GROUP_SIZE" if seq % 2 else "WRONG_TEMPERATURE")
        group = group_for((await run.lease(1))[0])
        verdict = await run.submit(envelope(11, replace(group, temperature=0.5)))
        assert isinstance(verdict, Verdict)
        assert verdict.code is VerdictCode.ACCEPTED


async def test_groups_that_an_operator_emptied_count_as_before_and_are_never_trained_again(tmp_path: Path) -> None:
    async with Running(await open_plane(tmp_path)) as run:
        await run.plane.advance(0, root(0))
        await run.answer(*await run.lease(4))
        await run.plane.mark_trained(await run.plane.take_batch(2, 0), 1)
        await run.plane.advance(1, root(1))
        state = run.plane.state(1)
    with sqlite3.connect(tmp_path / JOURNAL_FILE) as raw:
        raw.execute("UPDATE groups SET payload = x'' WHERE trained_step <= 1 OR dropped_step <= 1")
    raw.execute("VACUUM")
    raw.close()
    async with Running(await plane_again(tmp_path, state)) as run:
        assert (run.plane.tally.trained, dict(run.plane.tally.dropped), len(run.plane.buffer)) == (2, {}, 2)
    async with Running(await plane_again(tmp_path)) as run:  # without that checkpoint
        assert (run.plane.tally.trained, dict(run.plane.tally.dropped), len(run.plane.buffer)) == (0, {"DAMAGED": 2}, 2)

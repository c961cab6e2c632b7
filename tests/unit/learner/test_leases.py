"""The lease table: expiry, renewal, order, seeds, pacing, and that no death of a sampler stops the run."""

import asyncio
import math
from dataclasses import replace

import pytest

from services.learner.admission import Standing
from services.learner.leases import Granted
from services.learner.pacing import PacingRules
from services.learner.work import LeaseName, seed_of
from services.runtime.errors import StorageError
from services.wire.types import LeasePurpose
from tests.support.lease_table import PROMPTS, TTL_S, Table, ids


async def test_nothing_is_granted_before_the_first_version() -> None:
    assert await Table().grant() == Granted(leases=(), reason="pacing")


async def test_leases_carry_the_prompts_in_order_with_seeds_of_their_own() -> None:
    given = Table()
    given.table.advance(0)
    leases = await given.leases()
    assert ids(leases) == ["p0", "p1", "p2", "p3"]
    assert [lease.seed for lease in leases] == [seed_of(3, f"t{n}") for n in range(4)]
    assert len({lease.seed for lease in leases}) == 4
    assert all(0 <= lease.seed < 1 << 63 for lease in leases)
    assert (leases[0].group_size, leases[0].purpose, leases[0].ttl_ms) == (4, LeasePurpose.TRAIN, 60_000)
    assert given.recorded == (4, 0)


async def test_groups_out_and_waiting_never_exceed_the_room() -> None:
    given = Table(groups_per_step=3, max_staleness=2)
    given.table.advance(0)
    assert len(await given.leases(count=4)) == 4
    given.waiting = 3
    assert len(await given.leases()) == 2
    assert (await given.grant()).reason == "pacing"


async def test_the_online_mode_grants_one_step_of_the_current_version() -> None:
    given = Table(groups_per_step=3, max_staleness=0)
    given.table.advance(5)
    assert await given.leases(version=3) == []  # more than one swap away
    leases = await given.leases(version=4)
    assert [lease.min_policy_version for lease in leases] == [5, 5, 5]
    given.waiting = 3  # in the step under way
    for lease in leases:
        given.table.answer(lease.lease_id, "a")
    assert await given.leases(version=5) == []
    given.waiting = 0
    given.table.advance(6)
    assert len(await given.leases(version=6)) == 3


async def test_a_sampler_that_dies_in_the_online_mode_costs_its_leases_time_to_live() -> None:
    given = Table(groups_per_step=2, max_staleness=0)
    given.samplers = 2
    given.table.advance(0)
    dead, alive = await given.leases("a"), await given.leases("b")
    assert (len(dead), len(alive)) == (1, 1)
    given.table.answer(alive[0].lease_id, "b")
    given.waiting = 1
    assert await given.leases("b") == []
    given.clock.advance(TTL_S)
    assert ids(await given.leases("b")) == ids(dead)


async def test_renewed_leases_live_and_forgotten_ones_are_granted_again_first() -> None:
    given = Table()
    given.table.advance(0)
    kept, lost, *_ = await given.leases(count=2)
    for _ in range(3):
        given.clock.advance(TTL_S / 2)
        assert given.renew([kept]) == []
    again = await given.leases("b", count=2)
    assert ids(again) == [lost.prompt.prompt_id, "p2"]
    assert again[0].lease_id != lost.lease_id
    assert given.renew([kept, lost]) == [lost.lease_id]


async def test_an_expired_lease_that_nobody_else_has_goes_back_to_who_names_it() -> None:
    given = Table()
    given.table.advance(0)
    lease = (await given.leases(count=1))[0]
    given.clock.advance(TTL_S + 1)
    given.table.expire()
    assert given.renew([lease], "b") == [lease.lease_id]
    assert given.renew([lease]) == []
    assert "p0" not in ids(await given.leases("b"))


async def test_a_lease_is_not_renewed_for_ever_nor_for_a_sampler_that_never_gets_the_weights() -> None:
    given = Table(groups_per_step=1, max_staleness=0)
    given.table.advance(1)
    lease = (await given.leases(version=0))[0]
    assert lease.min_policy_version == 1
    for _ in range(3):
        given.clock.advance(TTL_S / 2 + 1)
        given.renew([lease], version=0)
    assert ids(await given.leases("b", version=1)) == ids([lease])
    hung = Table(groups_per_step=1, max_staleness=0)
    hung.table.advance(0)
    lease = (await hung.leases())[0]
    for _ in range(23):
        hung.clock.advance(TTL_S / 2)
        hung.renew([lease])
    assert ids(await hung.leases("b")) == ids([lease])


async def test_the_leases_of_a_lost_sampler_and_of_a_replaced_session_are_free_early() -> None:
    given = Table()
    given.table.advance(0)
    first = await given.leases("a", count=1)
    second = await given.leases("b", count=1)
    given.lost.add("a")
    given.table.replace_session("b")
    assert ids(await given.leases("c", count=1)) == ids(first)
    given.clock.advance(10.0)
    assert ids(await given.leases("c", count=1)) == ids(second)


async def test_released_leases_come_again_and_releasing_is_for_the_holder_alone() -> None:
    given = Table()
    given.table.advance(0)
    leases = await given.leases()
    given.table.release("b", [lease.lease_id for lease in leases], "drain")
    assert given.table.active == 4
    given.table.release("a", [leases[2].lease_id, leases[2].lease_id, "nonsense", "9-t1-1"], "generation_failed")
    assert given.table.active == 3
    assert ids(await given.leases("b")) == ["p2"]


async def test_a_prompt_that_is_always_given_back_is_given_up() -> None:
    given = Table(groups_per_step=1, max_staleness=0)
    given.table.advance(0)
    for _ in range(8):
        lease = (await given.leases())[0]
        assert lease.prompt.prompt_id == "p0"
        given.table.release("a", [lease.lease_id], "generation_failed")
    assert ids(await given.leases()) == ["p1"]
    assert [work.prompt.prompt_id for work in given.given_up] == ["p0"]


async def test_a_data_set_of_unusable_prompts_runs_out() -> None:
    given = Table()
    given.table.advance(0)
    while leases := await given.leases():
        given.table.release("a", [lease.lease_id for lease in leases], "bad_gold")
    assert {work.prompt for work in given.given_up} == set(PROMPTS)
    assert (await given.grant()).reason == "no_prompts"


async def test_one_sampler_among_several_cannot_use_up_a_data_set() -> None:
    given = Table()
    given.samplers = 3
    given.table.advance(0)
    for _ in range(3 * len(PROMPTS)):
        given.table.release("broken", [lease.lease_id for lease in await given.leases("broken", 1)], "bad_gold")
    assert not given.table.all_unusable
    for _ in range(len(PROMPTS)):
        given.table.release("b", [lease.lease_id for lease in await given.leases("b", 1)], "bad_gold")
    assert given.table.all_unusable
    assert (await given.grant("c")).reason == "no_prompts"


async def test_a_prompt_whose_groups_came_too_late_is_granted_again_but_not_for_ever() -> None:
    given = Table(groups_per_step=1, max_staleness=0)
    given.table.advance(0)
    for _ in range(3):
        lease = (await given.leases())[0]
        assert lease.prompt.prompt_id == "p0"
        given.table.answer(lease.lease_id, "a")
        given.table.reopen([0])
    assert ids(await given.leases()) == ["p1"]


async def test_a_late_group_of_a_prompt_that_was_opened_again_is_lost_and_no_fault_of_its_sampler() -> None:
    given = Table(groups_per_step=1, max_staleness=0)
    given.table.advance(0)
    late = (await given.leases("slow", count=1))[0].lease_id
    given.clock.advance(TTL_S)
    answered = (await given.leases("b", count=1))[0].lease_id
    given.table.answer(answered, "b")
    given.table.reopen([0])
    assert [given.table.facts(late, "slow").standing, given.table.facts(answered, "b").standing] == [Standing.OVER] * 2
    again = (await given.leases("b", count=1))[0]
    assert again.prompt.prompt_id == "p0"
    assert given.table.facts(again.lease_id, "b").standing is Standing.OPEN
    assert given.table.facts(late, "slow").standing is Standing.OVER


async def test_one_answer_holds_no_more_prompts_than_fit_a_message() -> None:
    given = Table(groups_per_step=5)
    given.table.advance(0)
    for work in (given.table._works._open_training(number) for number in range(4)):
        work.prompt = replace(work.prompt, metadata_json="x" * (1 << 20))
        given.table._works.put_back([work])
    given.table._works.following = 4
    assert [len(await given.leases(count=4)) for _ in range(2)] == [2, 4]  # 2 large, then 2 large and 2 small


async def test_a_group_that_could_not_be_written_keeps_its_lease_however_often_it_comes() -> None:
    given = Table()
    given.table.advance(0)
    lease = (await given.leases(count=1))[0]
    for _ in range(20):
        given.table.take_back(given.table.answer(lease.lease_id, "a"))
        assert lease.prompt.prompt_id not in ids(await given.leases("b"))
    assert given.table.facts(lease.lease_id, "a").standing is Standing.OPEN
    assert given.given_up == []


async def test_leases_that_cannot_be_recorded_are_not_granted() -> None:
    given = Table()
    given.table.advance(0)
    given.disk_full = True
    for _ in range(20):  # more than the grants after which a prompt is given up
        with pytest.raises(StorageError):
            await given.grant(count=4)
    given.disk_full = False
    assert ids(await given.leases(count=1)) == ["p0"]
    assert given.recorded == (4, 0)
    assert ids(await given.leases(count=2)) == ["p1", "p2"]
    assert given.given_up == []


async def test_a_cancelled_call_gives_back_what_it_took() -> None:
    given = Table()
    given.table.advance(0)
    call = asyncio.create_task(given.grant())
    await asyncio.sleep(0)
    assert given.table.active == 4
    call.cancel()
    await asyncio.wait([call])
    assert given.table.active == 0
    assert ids(await given.leases("b", count=1)) == ["p0"]


async def test_a_waiting_call_hears_of_a_new_version() -> None:
    given = Table(groups_per_step=1, max_staleness=0)
    given.table.advance(0)
    given.waiting = 1
    call = asyncio.create_task(given.grant(wait_s=10.0))
    await asyncio.sleep(0.01)
    assert not call.done()
    given.waiting = 0
    given.table.advance(1)
    async with asyncio.timeout(1):
        assert len((await call).leases) == 1


async def test_a_waiting_call_ends_when_it_is_refused() -> None:
    given = Table(groups_per_step=1, max_staleness=0)
    given.table.advance(0)
    given.waiting = 1
    reason = ""
    call = asyncio.create_task(given.table.grant("a", 1, 1, 0, 10.0, lambda: reason))
    await asyncio.sleep(0)
    reason, given.waiting = "draining", 0
    given.table.wake()
    async with asyncio.timeout(1):
        assert await call == Granted(leases=(), reason="draining")
    assert given.table.active == 0


async def test_one_sampler_does_not_take_the_share_of_the_others() -> None:
    given = Table(groups_per_step=4, max_staleness=0)
    given.samplers = 2
    given.table.advance(0)
    first = await given.leases("a")
    assert len(first) == 2
    assert await given.leases("a") == []
    assert len(await given.leases("b")) == 2


async def test_work_that_would_arrive_stale_is_not_granted_unless_the_learner_starves() -> None:
    given = Table(groups_per_step=1, max_staleness=1)
    for version in range(4):  # a step takes 10 s
        given.table.advance(version)
        given.clock.advance(10.0)
    slow = (await given.leases("slow", count=1, version=3))[0]
    given.clock.advance(50.0)
    given.table.answer(slow.lease_id, "slow")  # and this sampler takes 50 s
    given.table.advance(4)
    given.waiting = 1
    assert await given.leases("slow", version=4) == []
    assert [lease.min_policy_version for lease in await given.leases("fast", count=1, version=3)] == [4]
    given.waiting = 0
    given.table.release("fast", ["1-t1-1"], "drain")
    assert len(await given.leases("slow", count=1, version=4)) == 1


async def test_a_restart_makes_orphans_of_what_nobody_answered() -> None:
    given = Table(epoch=2, groups_per_step=5, max_staleness=0)
    given.table.restore(following=5, floor=1, answered={2, 4}, lost=set())
    given.table.advance(0)
    assert given.table.active == 2  # 1 and 3
    assert given.table.facts("1-t2-1", "a").standing is Standing.OVER
    assert given.table.facts("1-t3-1", "a").standing is Standing.OPEN
    assert given.table.facts("1-t5-1", "a").standing is Standing.NEVER
    assert given.table.facts("3-t1-1", "a").standing is Standing.OPEN  # of a start that a backup does not know
    assert given.table.facts("3-t5-1", "a").standing is Standing.NEVER
    assert list(given.table.renew("a", 1, ["1-t3-1", "1-t2-1"], 0)) == ["1-t2-1"]
    assert ids(await given.leases("b")) == ["p5", "p6", "p7"]
    given.clock.advance(TTL_S)
    assert ids(await given.leases("b", count=1)) == ["p1"]


async def test_a_prompt_whose_group_a_restart_dropped_comes_first_and_holds_the_floor_not_back() -> None:
    given = Table(epoch=2, groups_per_step=5, max_staleness=0)
    given.table.restore(following=100, floor=98, answered={98, 99}, lost={10})
    given.table.advance(0)
    leases = await given.leases("a", count=2)
    assert [lease.lease_id for lease in leases] == ["2-t10-1", "2-t100-1"]
    assert given.recorded == (101, 100)


async def test_what_a_sampler_gives_back_or_answers_wrongly_right_after_a_restart_is_free_at_once() -> None:
    given = Table(epoch=2, groups_per_step=5, max_staleness=0)
    given.table.restore(following=3, floor=0, answered=set(), lost=set())
    given.table.advance(0)
    given.table.refuse("1-t0-1", "a")
    given.table.release("a", ["1-t1-1", "2-t2-1"], "drain")  # the last one is of no grant that this start made
    assert given.table.active == 1
    assert ids(await given.leases("b", count=2)) == ["p0", "p1"]


async def test_a_lease_is_a_samplers_own_and_made_up_names_are_never_leased() -> None:
    given = Table()
    given.table.advance(0)
    lease = (await given.leases(count=1))[0]
    assert given.table.facts(lease.lease_id, "a").standing is Standing.OPEN
    for wrong in ("", "x", "1-t0-2", "1-t9-1", f"1-t{10**17}-1", "1-t0-1\n", "٣-t0-1", "2-t9-1"):
        assert given.table.facts(wrong, "a").standing is Standing.NEVER
    assert given.table.facts(lease.lease_id, "b").standing is Standing.NEVER


async def test_evaluation_goes_first_to_everyone_alike_and_outside_the_room() -> None:
    given = Table(groups_per_step=1, max_staleness=0)
    given.samplers = 2
    given.table.advance(4)
    given.waiting = 1
    given.table.add_eval(1, 4, PROMPTS[:4], 2)
    assert await given.leases("a", version=2) == []
    leases = await given.leases("a", version=4)
    assert ids(leases) == ["p0", "p1"]
    assert {(lease.eval_round, lease.min_policy_version, lease.group_size) for lease in leases} == {(1, 4, 2)}
    given.table.answer(leases[0].lease_id, "a")
    others = await given.leases("b", version=4)
    assert ids(others) == ["p2", "p3"]
    given.table.drop_eval(1)
    assert given.table.facts(others[0].lease_id, "b").standing is Standing.OVER


def test_lease_names_are_read_back() -> None:
    name = LeaseName.parse("3-e2.17-4")
    assert name == LeaseName(learner_epoch=3, key="e2.17", grant=4)
    assert (str(name), name.number, name.eval_round) == ("3-e2.17-4", None, 2)


def test_the_room_follows_the_formula() -> None:
    assert PacingRules(groups_per_step=8, max_staleness=4, ahead=0.5).room == 24
    assert PacingRules(groups_per_step=8, max_staleness=0, ahead=9.0).room == 8
    assert PacingRules(groups_per_step=3, max_staleness=1, ahead=0.5).room == math.floor(4.5)

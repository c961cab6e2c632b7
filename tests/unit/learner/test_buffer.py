"""The guarantee about staleness, and that waiting and cancelling lose nothing."""

import asyncio

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.learner.buffer import Dropped, DropReason, GroupBuffer, PendingGroup
from tests.support.data_side import Clock


def pending(row: int, version: int, arrived: float = 0.0) -> PendingGroup:
    return PendingGroup(
        id=row, sampler_id="eu-1", lease_number=row, policy_version=version, payload=b"", arrived=arrived
    )


class Drops:
    def __init__(self) -> None:
        self.seen: list[Dropped] = []

    async def __call__(self, dropped: tuple[Dropped, ...]) -> None:
        self.seen += dropped
        await asyncio.sleep(0)


def buffer(max_staleness: int = 2, max_age_s: float = 0.0, clock: Clock | None = None) -> tuple[GroupBuffer, Drops]:
    drops = Drops()
    clock = clock or Clock(0.0)
    return GroupBuffer(max_staleness=max_staleness, max_age_s=max_age_s, clock=clock, on_drop=drops), drops


async def test_the_oldest_policy_leaves_first() -> None:
    waiting, _ = buffer()
    waiting.add([pending(1, 5), pending(2, 3), pending(3, 4), pending(4, 3)])
    assert [group.id for group in await waiting.take(3, 5)] == [2, 4, 3]
    assert len(waiting) == 1


async def test_the_bound_holds_at_the_moment_of_the_step() -> None:
    waiting, drops = buffer(max_staleness=2)
    waiting.add([pending(1, 7), pending(2, 8), pending(3, 10), pending(4, 11)])
    assert [group.id for group in await waiting.take(2, 10)] == [2, 3]
    assert [(drop.group.id, drop.reason) for drop in drops.seen] == [(1, DropReason.STALE), (4, DropReason.FUTURE)]


async def test_the_online_mode_takes_the_current_version_only() -> None:
    waiting, drops = buffer(max_staleness=0)
    waiting.add([pending(1, 4), pending(2, 5)])
    assert [group.id for group in await waiting.take(1, 5)] == [2]
    assert [drop.group.id for drop in drops.seen] == [1]


async def test_take_waits_for_what_is_missing() -> None:
    waiting, _ = buffer()
    waiting.add([pending(1, 0)])
    taking = asyncio.create_task(waiting.take(2, 0))
    await asyncio.sleep(0.01)
    assert not taking.done()
    waiting.add([pending(2, 0)])
    async with asyncio.timeout(1):
        assert [group.id for group in await taking] == [1, 2]


async def test_groups_that_wait_too_long_are_dropped() -> None:
    clock = Clock(0.0)
    waiting, drops = buffer(max_age_s=10.0, clock=clock)
    waiting.add([pending(1, 0, arrived=0.0), pending(2, 0, arrived=5.0)])
    clock.advance(12.0)
    assert [group.id for group in await waiting.take(1, 0)] == [2]
    assert [drop.reason for drop in drops.seen] == [DropReason.TOO_OLD]


async def test_a_cancelled_take_leaves_everything_where_it_was() -> None:
    waiting, _ = buffer()
    waiting.add([pending(1, 0)])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await waiting.take(2, 0)
    waiting.add([pending(1, 0), pending(2, 0)])
    assert [group.id for group in await waiting.take(2, 0)] == [1, 2]


class BufferMachine(RuleBasedStateMachine):
    """Groups of any version come, steps take, versions rise: none leaves over the bound, none is lost or doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.max_staleness = 2
        self.buffer, self.drops = buffer(self.max_staleness)
        self.version = 0
        self.added: set[int] = set()
        self.taken: list[int] = []

    @rule(versions=st.lists(st.integers(-4, 2), max_size=4))
    def arrive(self, versions: list[int]) -> None:
        groups = [pending(len(self.added) + n, self.version + lag) for n, lag in enumerate(versions)]
        self.added |= {group.id for group in groups}
        self.buffer.add(groups)

    @rule(count=st.integers(1, 3), patience=st.booleans())
    def step(self, count: int, patience: bool) -> None:
        async def attempt() -> tuple[PendingGroup, ...]:
            task = asyncio.create_task(self.buffer.take(count, self.version))
            for _ in range(6 if patience else 1):
                await asyncio.sleep(0)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.wait([task])
            return ()

        batch = self.loop.run_until_complete(attempt())
        assert len(batch) in (0, count)
        assert all(0 <= self.version - group.policy_version <= self.max_staleness for group in batch)
        self.taken += [group.id for group in batch]

    @rule()
    def publish(self) -> None:
        self.version += 1

    @invariant()
    def every_group_is_in_one_place(self) -> None:
        dropped = [drop.group.id for drop in self.drops.seen]
        gone = self.taken + dropped
        assert len(gone) == len(set(gone))
        assert set(gone) <= self.added
        assert len(self.added) == len(gone) + len(self.buffer)

    def teardown(self) -> None:
        self.loop.close()


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)

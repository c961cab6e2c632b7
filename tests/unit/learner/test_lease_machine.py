"""Leases under any order of events: Hypothesis searches for one that loses a prompt or stops the run."""

import asyncio

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.learner.admission import Standing
from services.wire.types import Lease
from tests.support.lease_table import TTL_S, Table


class LeaseMachine(RuleBasedStateMachine):
    """Samplers lease, answer, forget and die while versions rise: no prompt is lost, none has two holders, the room is
    kept, and the learner can always go on."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.given = Table(groups_per_step=2, max_staleness=1)
        self.given.samplers = 2
        self.given.table.advance(0)
        self.version = 0
        self.held: dict[str, list[Lease]] = {"a": [], "b": []}
        self.answered: set[str] = set()

    samplers = st.sampled_from(["a", "b"])

    @rule(sampler=samplers, count=st.integers(1, 3), behind=st.integers(0, 3))
    def lease(self, sampler: str, count: int, behind: int) -> None:
        version = max(0, self.version - behind)
        self.held[sampler] += self.loop.run_until_complete(self.given.leases(sampler, count, version))

    @rule(sampler=samplers, pick=st.integers(0, 5))
    def answer(self, sampler: str, pick: int) -> None:
        if not self.held[sampler]:
            return
        lease = self.held[sampler].pop(pick % len(self.held[sampler]))
        key = lease.lease_id.split("-")[1]
        facts = self.given.table.facts(lease.lease_id, sampler)
        assert (facts.standing is Standing.OPEN) == (key not in self.answered)
        if facts.standing is Standing.OPEN:
            self.given.table.answer(lease.lease_id, sampler)
            self.answered.add(key)
            self.given.waiting += 1

    @rule(sampler=samplers, known=st.integers(0, 4))
    def heartbeat(self, sampler: str, known: int) -> None:
        self.given.renew(self.held[sampler][:known], sampler, self.version)

    @rule(sampler=samplers)
    def die(self, sampler: str) -> None:
        self.held[sampler].clear()

    @rule(seconds=st.sampled_from([5.0, 40.0, 90.0]))
    def wait(self, seconds: float) -> None:
        self.given.clock.advance(seconds)

    @precondition(lambda self: self.given.waiting >= 2)
    @rule()
    def step(self) -> None:
        self.given.waiting -= 2
        self.version += 1
        self.given.table.advance(self.version)

    @invariant()
    def the_room_is_kept(self) -> None:
        self.given.table.expire()
        assert self.given.table.active + self.given.waiting <= self.given.room.room

    def teardown(self) -> None:
        """Whatever happened: a fresh sampler alone brings the run forward."""

        async def finish() -> None:
            for _ in range(3):
                goal = self.version + 1
                for _ in range(20):
                    self.given.clock.advance(TTL_S)
                    for lease in await self.given.leases("a", 99, self.version):
                        self.given.table.answer(lease.lease_id, "a")
                        self.given.waiting += 1
                    if self.given.waiting >= 2:
                        self.step()
                        break
                assert self.version == goal

        self.given.samplers = 1
        self.loop.run_until_complete(finish())
        self.loop.close()


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)

"""A lease table in a learner of which only the variables are left, for tests of leases."""

import asyncio
from pathlib import Path

from services.learner.dataset import Dataset, PromptOrder
from services.learner.leases import Granted, LeaseRules, LeaseTable, Surroundings
from services.learner.pacing import Pacing, PacingRules
from services.learner.work import Work
from services.runtime.errors import StorageError
from services.wire.types import Lease, Prompt
from tests.support.data_side import Clock

TTL_S = 60.0
PROMPTS = tuple(Prompt(prompt_id=f"p{n}", text=f"{n}?", answer="x") for n in range(10))


class Table:
    """A lease table in a learner that is all test doubles around it: buffer, sessions and journal are variables."""

    def __init__(self, *, groups_per_step: int = 2, max_staleness: int = 1, epoch: int = 1) -> None:
        self.clock = Clock(0.0)
        self.waiting = 0
        self.lost: set[str] = set()
        self.samplers = 1
        self.recorded = (0, 0)
        self.disk_full = False
        self.given_up: list[Work] = []
        self.room = PacingRules(groups_per_step=groups_per_step, max_staleness=max_staleness, ahead=1.0)
        order = PromptOrder(Dataset(path=Path("x"), prompts=PROMPTS, sha256=""), 1, False)
        self.table = LeaseTable(
            rules=LeaseRules(run_seed=3, group_size=4, ttl_s=TTL_S, grace_s=10.0),
            order=order,
            pacing=Pacing(self.room, self.clock),
            learner_epoch=epoch,
            clock=self.clock,
            around=Surroundings(
                waiting=lambda: self.waiting,
                alive=lambda sampler_id, _: sampler_id not in self.lost,
                samplers=lambda: self.samplers,
                record=self.record,
                given_up=self.given_up.append,
            ),
        )

    async def record(self, following: int, floor: int) -> None:
        await asyncio.sleep(0)
        if self.disk_full:
            raise StorageError("disk full")
        self.recorded = (following, floor)

    async def grant(self, sampler_id: str = "a", count: int = 99, version: int = 0, wait_s: float = 0.0) -> Granted:
        return await self.table.grant(sampler_id, 1, count, version, wait_s)

    async def leases(self, sampler_id: str = "a", count: int = 99, version: int = 0) -> list[Lease]:
        return list((await self.grant(sampler_id, count, version)).leases)

    def renew(self, leases: list[Lease], sampler_id: str = "a", version: int = 0) -> list[str]:
        return list(self.table.renew(sampler_id, 1, [lease.lease_id for lease in leases], version))


def ids(leases: list[Lease]) -> list[str]:
    return [lease.prompt.prompt_id for lease in leases]

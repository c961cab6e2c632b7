"""A learner's data side at work without a server, and one sampler that speaks to it."""

import asyncio

from services.learner.data_plane import DataPlane
from services.learner.intake import Arrival, Gap
from services.wire.types import GroupEnvelope, Lease, Verdict, VerdictCode
from tests.support.data_side import envelope, group_for


class Running:
    """A plane with its intake at work."""

    def __init__(self, plane: DataPlane) -> None:
        self.plane = plane
        self.seq = plane._recovered.heads.get(("eu-1", "spool"), 0)

    async def __aenter__(self) -> "Running":
        self.task = asyncio.create_task(self.plane.run())
        await self.plane.sessions.register("eu-1")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.plane.close()

    async def lease(self, count: int, version: int = 0) -> list[Lease]:
        return list((await self.plane.leases.grant("eu-1", 1, count, version, 0.0)).leases)

    async def submit(self, given: GroupEnvelope) -> Verdict | Gap:
        arrival = Arrival(sampler_id="eu-1", session_epoch=1, spool_id="spool", envelope=given)
        return await (await self.plane.intake.submit(arrival))

    async def answer(self, *leases: Lease, version: int | None = None) -> None:
        for lease in leases:
            self.seq += 1
            verdict = await self.submit(envelope(self.seq, group_for(lease, version)))
            assert isinstance(verdict, Verdict)
            assert verdict.code is VerdictCode.ACCEPTED, verdict

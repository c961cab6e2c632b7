"""From a plan's files to verified weights, in as little memory and time as may be.

One step: its parts are decoded as they come (EarlyDecoder), where there is memory of an old version to decode into.
An update may be decoded while the learner still makes it. Otherwise, and wherever that gives nothing: apply_update on
all files of a step, one step after another.

Between two versions that memory is made a copy of the newer one (`recycle`): when the next delta comes, only what it
changes is written.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from services.runtime.errors import HeteroRLError
from services.sampler.arrivals import Arrivals
from services.sampler.plan_fetch import PlanFetch
from services.wire.delta import BitTensor, apply_update, validate_names_shapes
from services.wire.delta.early import EarlyDecoder, copy_into, copy_of
from services.wire.types import Plan, PlanStep, UpdateKind

Held = Mapping[str, BitTensor]


class Decoding:
    """`workers` are threads. One plan at a time."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._spare: Held | None = None
        """Memory of a version that neither we nor the engine need any more: the next one is decoded into it."""
        self._copy_of: Held | None = None
        """What `_spare` is a copy of."""

    async def prepare(self, held: Held) -> None:
        """Makes memory for the first delta, which the later ones use again."""
        self._spare = await asyncio.to_thread(copy_of, held, self._workers)
        self._copy_of = held

    async def level(self, held: Held) -> None:
        """Makes the memory for the next delta a copy of what is held again, after one that came to nothing."""
        if self._spare is not None and self._copy_of is not held:
            await self.recycle(self._spare, held)

    async def recycle(self, weights: Held, held: Held) -> None:
        """Takes memory that neither we nor the engine need any more, and makes it a copy of what is held."""
        self._copy_of = None
        self._spare = weights
        if await asyncio.to_thread(copy_into, weights, held, self._workers):
            self._copy_of = held

    async def carry_out(self, plan: Plan, fetch: PlanFetch, held: Held | None, *, early: bool = True) -> Held:
        """The weights that `plan` leads to from `held`: each step's root is proved, and the last one's values are those
        of a policy. Not `early`: EarlyDecoder has been tried. Raises what fetching, apply_update and
        validate_names_shapes raise."""
        base = held
        for step in plan.steps:
            spare, self._spare = self._spare, None
            level, self._copy_of = held is not None and self._copy_of is held, None
            try:
                one = early and len(plan.steps) == 1 and step.kind is UpdateKind.DELTA
                if one and held is not None and spare is not None:
                    weights = await self._as_it_comes(step, fetch, held, spare, level)
                    if weights is not None:
                        return weights
                paths = await fetch.files(step)
                before, base = base, await asyncio.to_thread(self._apply, plan, step, paths, base, spare)
            except HeteroRLError:
                self._spare = spare
                raise
            if before is not held:
                self._spare = before  # between two steps of a plan
        assert base is not None, "a plan from nothing has a step"
        try:
            await asyncio.to_thread(validate_names_shapes, base, base if held is None else held, self._workers)
        except HeteroRLError:
            self._spare = None if base is held else base
            raise
        return base

    async def while_it_is_made(self, arrivals: Arrivals, fetch: PlanFetch, held: Held) -> Held | None:
        """The weights of an update that the learner is still making, verified once its plan is there. None where the
        learner gave it up, or its plan must be carried out like any other. Raises what fetching raises."""
        spare, self._spare = self._spare, None
        level, self._copy_of = self._copy_of is held, None
        early = None if spare is None else self._early(held, spare, arrivals.base_root, level)
        weights: Held | None = None
        number = 0
        try:
            while (ref := await arrivals.object(number)) is not None:
                path = await fetch.file(ref)
                number += 1
                if early is not None:
                    await asyncio.to_thread(early.add, path)
            if early is not None and arrivals.plan is not None:
                weights = await asyncio.to_thread(early.finish, arrivals.plan.target.decoded.root)
        finally:
            if early is not None:
                await asyncio.to_thread(early.close)
            if weights is None:
                self._spare = spare
        return weights

    async def _as_it_comes(self, step: PlanStep, fetch: PlanFetch, held: Held, spare: Held, level: bool) -> Held | None:
        """The verified weights, or None; then `spare` may be overwritten again."""
        early = self._early(held, spare, step.base_root, level)
        try:
            for ref in step.objects:
                await asyncio.to_thread(early.add, await fetch.file(ref))
            return await asyncio.to_thread(early.finish, step.target_root)
        finally:
            await asyncio.to_thread(early.close)

    def _early(self, held: Held, spare: Held, base_root: str, level: bool) -> EarlyDecoder:
        return EarlyDecoder(held, spare, base_root=base_root, workers=self._workers, level=level)

    def _apply(self, plan: Plan, step: PlanStep, paths: list[Path], base: Held | None, spare: Held | None) -> Held:
        """One update, out of place: with `spare` no more memory than for one part. apply_update proves the root of
        what it returns."""
        return apply_update(
            paths,
            base,
            expect_root=step.target_root,
            expect_bytes=plan.target.decoded.full_bytes,
            workers=self._workers,
            staging=spare,
        )

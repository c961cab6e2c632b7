"""The training loop: batches in, versions out.

    evaluate version 0 ─► ┌─ take a batch ─► step ─► mark trained ─► publish ─► advance ─┐ ─► evaluate the last version
                          └──────────────────── checkpoint every N ◄────────────────────┘

Version n is the policy after n applied steps. With max_staleness = 0 everything is one after another; else the next
step waits for nothing but the copy of the weights in wire format: the version is encoded, stored and announced while
the next batch is awaited and computed. At most one version is on its way out.
"""

import asyncio
import math
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

from services.learner.checkpoint import Checkpoints, Position
from services.learner.config import LearnerConfig
from services.learner.data_plane import DataPlane, TakenBatch
from services.learner.evaluation import EvalRound
from services.learner.plans import Planner
from services.learner.policy import Policy
from services.learner.publisher import Published, Publisher
from services.learner.records import EVAL_ROUND, Record, Records
from services.learner.run_control import RunControl, unless_set
from services.learner.run_state import Activity, EvalPoint, RunState
from services.learner.snapshots import Snapshots
from services.learner.traffic import Traffic
from services.learner.trainer import Trainer
from services.runtime.errors import DiskFullError, HeteroRLError
from services.runtime.failpoints import hit
from services.runtime.log import get_logger
from services.wire.types import Prompt

NONFINITE = "NONFINITE"
"""Why the groups of a step that was not applied are dropped."""
_MOST_NONFINITE = 8
"""Steps in a row that were not applied before the run ends: nothing will heal it."""

_log = get_logger("learner.loop")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopParts:
    """What the loop works with."""

    config: LearnerConfig
    policy: Policy
    trainer: Trainer
    plane: DataPlane
    publisher: Publisher
    planner: Planner
    checkpoints: Checkpoints
    traffic: Traffic
    state: RunState
    records: Records
    control: RunControl
    eval_prompts: Sequence[Prompt]
    model_objects: frozenset[str]


class RunLoop:
    """`run` is the main flow; `finished` says whether it came to its end or was stopped."""

    def __init__(self, parts: LoopParts) -> None:
        self._p = parts
        self._saved = (parts.state.step, len(parts.state.evals)) if parts.checkpoints.steps() else None
        """Step and evaluations that the newest checkpoint holds: one evaluation comes after the last step."""
        self._nonfinite = 0
        on_device = parts.config.publish.diff_on_device and parts.policy.device.type == "cuda"
        self._snapshots = Snapshots(parts.policy, on_device=on_device, workers=parts.config.publish.workers)
        self._evaluating: asyncio.Task[None] | None = None
        self._publishing: asyncio.Task[None] | None = None
        """At most one version is on its way out, while the next step computes."""

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are taken."""
        steps = self._p.config.run.steps
        return 0 < steps <= self._p.state.step

    async def run(self) -> None:
        """*Consumes* batches; *waits for* samplers; *produces* versions, checkpoints and records; returns at the run's
        last step or after a stop; *on cancel* the run goes on from its last checkpoint."""
        try:
            if self._p.config.eval.at_start and not self._p.state.evals:
                await self._evaluate(gates=True)
            batch = await self._take()
            while batch is not None:
                batch = await self._one_step(batch)
            await self._published()
            if self.finished and self._p.config.eval.at_end:
                await self._final_evaluation()
        finally:
            beside = [task for task in (self._publishing, self._evaluating) if task is not None]
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        await self._p.plane.room.until_written("checkpoint", self.checkpoint)

    async def _one_step(self, batch: TakenBatch) -> TakenBatch | None:
        """Trains one batch and returns the next; None at the end."""
        p = self._p
        if p.control.paused:
            p.state.switch(Activity.PAUSE)
            await p.control.wait_until_running()
        p.state.switch(Activity.TRAIN)
        hit("step.before")
        result = await asyncio.to_thread(p.trainer.step, batch.groups)
        await self._published()
        step = p.state.step + 1
        if not result.applied:
            await self._skip(batch, step)
            return await self._take()
        self._nonfinite = 0
        await p.plane.room.until_written("trained groups", lambda: p.plane.mark_trained(batch, step))
        hit("step.after_mark_trained")
        p.state.step = step
        mismatch = {**p.state.mismatch, **result.mismatch}
        p.state.mismatch = {name: mismatch[name] for name in mismatch if p.plane.sessions.find(name) is not None}
        await asyncio.to_thread(self._snapshots.take)
        next_batch = await self._publish_and_take(self._publish(step, result.metrics))
        if self._due(p.config.checkpoint.every_steps):
            await self._published()
            await self._checkpoint_in_between()
        if self._due(p.config.eval.every_steps) and not self.finished:
            await self._published()
            self._evaluate_beside()
        return next_batch

    async def _publish_and_take(self, work: Coroutine[None, None, None]) -> TakenBatch | None:
        """The next batch is for a step from `step`, so its staleness is exact although that version is not out yet."""
        self._p.state.switch(Activity.PUBLISH)
        publishing = self._publishing = asyncio.create_task(work)
        if self._p.config.staleness.max_staleness == 0:
            await self._published()
            return await self._take()
        taking = asyncio.create_task(self._take(beside=publishing))
        try:
            await asyncio.wait((publishing, taking), return_when=asyncio.FIRST_COMPLETED)
            if publishing.done():  # else its failure would leave the batch awaited for ever: it needs the version
                await self._published()
            return await taking
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _published(self) -> None:
        """Waits for the version that is on its way out, and raises what ended that."""
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            await publishing

    async def _publish(self, step: int, metrics: dict[str, float]) -> None:
        """The snapshot that was taken."""
        p = self._p
        room = p.plane.room
        weights, comparison = await asyncio.to_thread(self._snapshots.finish)
        p.trainer.published(step, weights)
        published = await room.until_written("version", lambda: p.publisher.publish(step, weights, comparison))
        await room.until_written("version", lambda: p.plane.advance(step, published.root))
        if published.update_bytes:
            p.state.ratios.append(published.delta_ratio)
        p.state.metrics = {**metrics, **_publish_metrics(published)}
        await self._record(Record(step=step, wall_s=p.state.wall_s, metrics=p.state.metrics))
        if step % max(1, p.config.publish.keep_versions // 4) == 0:
            await p.planner.collect(p.model_objects, p.traffic)

    async def _record(self, record: Record) -> None:
        async def append() -> None:
            self._p.records.append(record)

        await self._p.plane.room.until_written("metrics", append)

    async def _take(self, beside: asyncio.Task[None] | None = None) -> TakenBatch | None:
        """The next batch; None where the run is at its end or was stopped. Time counts as waiting for groups once
        nothing else goes on."""
        p = self._p
        if self.finished or p.control.stopping.is_set():
            return None

        def waits(_: object = None) -> None:
            p.state.switch(Activity.WAIT_GROUPS)

        if beside is None:
            waits()
        else:
            beside.add_done_callback(waits)
        try:
            return await unless_set(
                p.control.stopping, p.plane.take_batch(p.config.batch.groups_per_step, p.state.step)
            )
        finally:
            if beside is not None:
                beside.remove_done_callback(waits)  # training may go on while it publishes

    async def _skip(self, batch: TakenBatch, step: int) -> None:
        self._nonfinite += 1
        _log.error("step_not_finite", step=step, in_a_row=self._nonfinite)
        plane = self._p.plane
        await plane.room.until_written("drops", lambda: plane.drop_batch(batch, NONFINITE, step))
        if self._nonfinite >= _MOST_NONFINITE:
            raise HeteroRLError(
                f"{self._nonfinite} steps in a row had a loss or gradient that is not finite: lower optimizer.lr, and "
                "start again from the last checkpoint"
            )

    def _due(self, every: int) -> bool:
        return every > 0 and self._p.state.step % every == 0

    async def _checkpoint_in_between(self) -> None:
        """On a full disk it is left out where there is an earlier one, and waited for where there is none."""
        if self._saved is None:
            await self._p.plane.room.until_written("checkpoint", self.checkpoint)
            return
        try:
            await self.checkpoint()
        except DiskFullError as error:
            _log.error("checkpoint_not_written", step=self._p.state.step, newest=self._saved[0], error=error)

    async def checkpoint(self) -> None:
        """Writes the state after the last step and evaluation, unless it is written."""
        p = self._p
        await self._published()
        now, saved = (p.state.step, len(p.state.evals)), self._saved
        if now == saved:
            return
        before = p.state.activity
        p.state.switch(Activity.CHECKPOINT)
        position = Position(
            step=p.state.step,
            version=p.state.step,
            root=p.publisher.latest.version.root,
            trainer_steps=p.trainer.steps_taken,
            data=p.plane.state(p.state.step),
            counters={"state": p.state.to_json(), "traffic": p.traffic.state()},
        )
        try:
            await asyncio.to_thread(p.records.sync)
            if saved is not None and saved[0] == position.step:
                path = await asyncio.to_thread(p.checkpoints.write_again, position)
            else:
                path = await asyncio.to_thread(p.checkpoints.write, position, p.policy, p.trainer)
        finally:
            p.state.switch(before)
        self._saved = now
        _log.info("checkpoint_written", path=path, step=position.step)

    def _evaluate_beside(self) -> None:
        """Starts a round that training does not wait for; skipped where the last one still goes on."""
        if self._evaluating is not None and not self._evaluating.done():
            _log.info("evaluation_skipped", step=self._p.state.step, reason="the last one still goes on")
            return
        if self._evaluating is not None:
            self._evaluating.result()
        self._evaluating = asyncio.create_task(self._evaluate(gates=False))

    async def _final_evaluation(self) -> None:
        if self._evaluating is not None:
            self._p.state.switch(Activity.EVALUATE)
            await self._evaluating
        if not (self._p.state.evals and self._p.state.evals[-1].policy_version == self._p.state.step):
            await self._evaluate(gates=True)

    async def _evaluate(self, *, gates: bool) -> None:
        """One round, unless there are no held-out prompts. A stop ends it without a result."""
        p = self._p
        if not p.eval_prompts or p.control.stopping.is_set():
            return
        if gates:
            p.state.switch(Activity.EVALUATE)
        opened: EvalRound = await p.plane.room.until_written(
            "evaluation", lambda: p.plane.evaluate(p.eval_prompts, p.config.eval.samples)
        )
        try:
            result = await unless_set(p.control.stopping, opened.result())
        finally:
            p.plane.evaluation.cancel(opened)
        if result is None or math.isnan(result.accuracy):
            return
        point = EvalPoint(
            round=result.round,
            policy_version=result.policy_version,
            accuracy=result.accuracy,
            prompts=result.prompts,
            wall_s=p.state.wall_s,
        )
        p.state.evals.append(point)
        metrics = {
            "accuracy": result.accuracy,
            EVAL_ROUND: float(result.round),
            "eval_prompts": float(result.prompts),
            "eval_given_up": float(result.given_up),
            "eval_tokens": float(result.tokens),
        }
        await self._record(Record(step=result.policy_version, wall_s=p.state.wall_s, metrics=metrics))
        _log.info("evaluated", version=result.policy_version, accuracy=result.accuracy, prompts=result.prompts)


def _publish_metrics(published: Published) -> dict[str, float]:
    return {
        "publish_s": published.seconds,
        "update_bytes": float(published.update_bytes),
        "full_bytes": float(published.full_bytes),
        "delta_ratio": published.delta_ratio,
        "changed_share": published.changed_share,
    }

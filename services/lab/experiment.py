"""One cell of an experiment, start to end: production's buffer, batches, loss and trainer, in virtual time.

base policy ─► version 0 ─► [ samplers ─► buffer.take ─► decode ─► Trainer.step ─► next version ] × steps ─► result
"""

import asyncio
import copy
import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from services.lab.arena import Arena, Cell
from services.lab.clock import run_virtual
from services.lab.contestants import (
    Drawer,
    expected_accuracy,
    make_drawer,
    make_model,
    snapshot,
    supervise,
    to_device,
)
from services.lab.sum_tasks import VOCAB_SIZE, Problems
from services.lab.virtual_sampler import Bulletin, Desk, Link, Scribe, VirtualSampler, run_lagging, staleness_histogram
from services.learner.batches import TrainGroup
from services.learner.buffer import Dropped, GroupBuffer, PendingGroup
from services.learner.pacing import PacingRules
from services.learner.policy import Policy
from services.learner.trainer import Trainer, TrainerSettings
from services.runtime.config import Section
from services.runtime.errors import BadInputError, ConfigError
from services.sampler.delays import Delays
from services.wire.convert import decode_group

FOLLOWED = ("grad_norm", "weight_var", "weight_mean", "kl_k1", "kl_k2", "clip_share", "entropy", "reward_mean")
"""Metrics of a step that a result keeps; `staleness_mean` beside them."""
_JUDGE_SEED = 0x7E57


class Measurement(Section):
    """The state after `step` steps: accuracy then, and means of the steps since the last measurement."""

    step: int
    accuracy: float
    means: dict[str, float] = {}


class CellResult(Section):
    """What one cell gave."""

    cell: Cell
    first: float
    """Accuracy before the first step."""
    best: float
    last: float
    grad_norm_mean: float
    grad_norm_max: float
    weight_var_mean: float
    weight_var_max: float
    kl_mean: float
    """k2 learner to sampler, mean over steps, nats per token."""
    clip_share_mean: float
    skipped_steps: int
    """Steps whose loss or gradient was not finite."""
    dropped: dict[str, int]
    """Groups by reason."""
    staleness: dict[str, int]
    """Trained groups by staleness in versions."""
    virtual_s: float
    course: list[Measurement] = Field(default_factory=list[Measurement])

    @property
    def gap(self) -> float:
        """Best minus last."""
        return self.best - self.last

    @property
    def late(self) -> float:
        """Mean accuracy of the last five measurements: what `last` is without the chance of one moment."""
        tail = self.course[-5:]
        return sum(measured.accuracy for measured in tail) / len(tail)


@dataclass(slots=True)
class _Notes:
    """What is written down on the way."""

    steps: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    course: list[Measurement] = field(default_factory=list[Measurement])
    dropped: Counter[str] = field(default_factory=Counter[str])
    staleness: Counter[int] = field(default_factory=Counter[int])
    skipped: int = 0
    measured_through: int = 0

    async def count_drops(self, drops: tuple[Dropped, ...]) -> None:
        self.dropped.update(drop.reason.value for drop in drops)

    def measure(self, step: int, accuracy: float) -> None:
        since = self.steps[self.measured_through :]
        names = [name for name in (*FOLLOWED, "staleness_mean") if since and name in since[0]]
        means = {name: _rounded(sum(one[name] for one in since) / len(since)) for name in names}
        self.course.append(Measurement(step=step, accuracy=_rounded(accuracy), means=means))
        self.measured_through = len(self.steps)


class Judge:
    """Measures accuracy: exactly where one completion is right, else by one draw per problem from a fixed seed."""

    def __init__(self, arena: Arena, device: torch.device) -> None:
        self._task = arena.sums
        self._problems: Problems = to_device(self._task.draw(arena.eval_problems, _JUDGE_SEED), device)
        self._drawer: Drawer | None = None if self._task.one_answer else make_drawer(arena.policy, self._task, device)

    def accuracy(self, model: PreTrainedModel) -> float:
        if self._drawer is None:
            accuracy = expected_accuracy(model, self._problems)
            return accuracy if math.isfinite(accuracy) else 0.0  # weights that exploded answer nothing
        self._drawer.load(snapshot(model))
        drawn = self._drawer.draw(self._problems, 1, _JUDGE_SEED)
        return float(self._task.rewards(self._problems, drawn.tokens_BT, drawn.length_B).mean())


def base_policy(cell: Cell, folder: Path | None) -> PreTrainedModel:
    """The policy that the cell starts from, from `folder` or made and kept there.

    Raises ConfigError where the policy cannot do the task, or supervision does not reach `arena.warm_up`; BadInputError
    for a damaged file in `folder`.
    """
    arena = cell.arena
    try:
        model = make_model(arena.policy, arena.sums, cell.seed)
    except ValueError as error:
        raise ConfigError(f"arena.policy: {error}") from None
    kept = None if folder is None else folder / f"{cell.base_key}.safetensors"
    if kept is not None and kept.exists():
        try:
            model.load_state_dict(load_file(kept), strict=False)
        except (SafetensorError, RuntimeError) as error:
            raise BadInputError(f"{kept} is not the base policy of its name: delete it") from error
        return model
    model.to(torch.device(arena.device))  # pyright: ignore[reportArgumentType] - its own self
    try:
        supervise(model, arena.sums, until=arena.warm_up, lr=arena.warm_up_lr, seed=cell.seed, most_steps=20_000)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model.cpu()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        save_file({name: tensor.contiguous() for name, tensor in _untied(model).items()}, partial)
        partial.replace(kept)
    return model


def run_cell(cell: Cell, bases: Path | None = None) -> CellResult:
    """Runs one cell in this process, on one thread. Equal cells give equal results on one machine and torch.

    `bases`: folder of warmed-up policies, shared by the cells. Raises as `base_policy`, and for a bad trace of delays.
    """
    return run_virtual(_run(cell, bases))


async def _run(cell: Cell, bases: Path | None) -> CellResult:
    arena, device = cell.arena, torch.device(cell.arena.device)
    loop, notes = asyncio.get_running_loop(), _Notes()
    model = base_policy(cell, bases)
    model.to(device)  # pyright: ignore[reportArgumentType] - its own self
    policy = Policy(model=model, files={}, device=device, vocab_size=VOCAB_SIZE)
    trainer = Trainer(
        policy,
        TrainerSettings(
            optimizer=cell.optimizer,
            loss=cell.loss,
            temperature=1.0,
            micro_batch_tokens=arena.micro_batch_tokens,
            autocast=False,
        ),
        reference=replace(policy, model=copy.deepcopy(model)) if cell.loss.wants_reference else None,
    )
    buffer = GroupBuffer(max_staleness=cell.max_staleness, max_age_s=0.0, clock=loop.time, on_drop=notes.count_drops)
    rules = PacingRules(groups_per_step=arena.prompts_per_step, max_staleness=cell.max_staleness, ahead=arena.ahead)
    desk, bulletin = Desk(buffer, rules, loop.time), Bulletin(cell.max_staleness + 2)
    judge = Judge(arena, device)
    notes.measure(0, judge.accuracy(model))
    await bulletin.publish(0, snapshot(model))
    samplers = asyncio.create_task(_samplers(cell, bulletin, desk, device))
    learner = asyncio.create_task(_learn(cell, trainer, model, buffer, desk, bulletin, judge, notes))
    try:
        await asyncio.wait({samplers, learner}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (samplers, learner):
            task.cancel()
        ended = await asyncio.gather(samplers, learner, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
    return _result(cell, notes, loop.time())


async def _samplers(cell: Cell, bulletin: Bulletin, desk: Desk, device: torch.device) -> None:
    arena = cell.arena
    scribe = Scribe(
        task=arena.sums,
        drawer=make_drawer(arena.policy, arena.sums, device),
        group_size=arena.group_size,
        seed=cell.seed,
    )
    if cell.lag_versions is not None:
        await run_lagging(scribe, bulletin, desk, lag_versions=cell.lag_versions, count=arena.prompts_per_step)
        return
    # All samplers together make `supply` × prompts_per_step groups in step_s, in batches of about a step's share.
    count = max(1, arena.prompts_per_step // arena.samplers)
    batch_s = arena.step_s * arena.samplers * count / (arena.prompts_per_step * arena.supply)
    async with asyncio.TaskGroup() as tasks:
        for number in range(arena.samplers):
            name = f"sampler-{number}"
            seed = cell.delay.seed + cell.seed
            link = Link(
                weights=Delays(cell.delay.weights, seed, name, "weights"),
                rollouts=Delays(cell.delay.rollouts, seed, name, "rollouts"),
            )
            speed = arena.speeds[number % len(arena.speeds)]
            sampler = VirtualSampler(name, scribe, bulletin, desk, link, count=count, batch_s=batch_s / speed)
            tasks.create_task(sampler.run())


async def _learn(
    cell: Cell,
    trainer: Trainer,
    model: PreTrainedModel,
    buffer: GroupBuffer,
    desk: Desk,
    bulletin: Bulletin,
    judge: Judge,
    notes: _Notes,
) -> None:
    """*Consumes* groups; *waits for* a full step of them; *produces* versions and notes."""
    arena, loop = cell.arena, asyncio.get_running_loop()
    for version in range(arena.steps):
        taken = await buffer.take(arena.prompts_per_step, version)
        groups = [_train_group(pending, version, loop.time()) for pending in taken]
        desk.in_training = len(groups)
        notes.staleness.update(group.staleness for group in groups)
        outcome = trainer.step(groups)
        if outcome.applied:
            notes.steps.append({name: outcome.metrics[name] for name in (*FOLLOWED, "staleness_mean")})
        else:
            notes.skipped += 1
        await asyncio.sleep(arena.step_s)
        if (version + 1) % arena.eval_every == 0 or version + 1 == arena.steps:
            notes.measure(version + 1, judge.accuracy(model))
        await bulletin.publish(version + 1, snapshot(model))
        desk.in_training = 0
        desk.pacing.advanced()
        await desk.changed()


def _train_group(pending: PendingGroup, version: int, now: float) -> TrainGroup:
    """As production's data plane makes them."""
    return TrainGroup(
        group=decode_group(pending.payload),
        sampler_id=pending.sampler_id,
        staleness=version - pending.policy_version,
        age_s=now - pending.arrived,
    )


def _result(cell: Cell, notes: _Notes, virtual_s: float) -> CellResult:
    def column(name: str) -> list[float]:
        return [one[name] for one in notes.steps] or [0.0]

    def mean(name: str) -> float:
        return _rounded(sum(column(name)) / len(column(name)))

    return CellResult(
        cell=cell,
        first=notes.course[0].accuracy,
        best=max(measured.accuracy for measured in notes.course),
        last=notes.course[-1].accuracy,
        grad_norm_mean=mean("grad_norm"),
        grad_norm_max=_rounded(max(column("grad_norm"))),
        weight_var_mean=mean("weight_var"),
        weight_var_max=_rounded(max(column("weight_var"))),
        kl_mean=mean("kl_k2"),
        clip_share_mean=mean("clip_share"),
        skipped_steps=notes.skipped,
        dropped=dict(sorted(notes.dropped.items())),
        staleness=staleness_histogram(notes.staleness),
        virtual_s=virtual_s,
        course=notes.course,
    )


def _untied(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor once."""
    found: dict[int, str] = {}
    tensors = cast("dict[str, Tensor]", model.state_dict())
    for name, tensor in tensors.items():
        found.setdefault(tensor.data_ptr(), name)
    return {name: tensors[name] for name in found.values()}


def _rounded(value: float) -> float:
    """Six significant digits: what a result needs."""
    return float(f"{value:.6g}")

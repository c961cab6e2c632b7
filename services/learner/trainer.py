"""One optimizer step: groups to rows, rows to micro-batches, gradients to masters.

    groups ─► build_batch ─► prepare (once) ─► for each micro-batch: forward ─► loss_of ─► backward ─► clip ─► AdamW

The loss of the batch is the sum over its micro-batches, so that the result does not depend on the cut. Everything here
blocks: the learner calls `step` in a thread.
"""

import bisect
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from services.learner.batches import RowBatch, TrainGroup, build_batch, micro_batches
from services.learner.config import OptimizerSection
from services.learner.forward import Forward
from services.learner.losses.evaluate import loss_of
from services.learner.losses.metrics import PartialMetrics, finish_metrics
from services.learner.losses.prepare import prepare
from services.learner.losses.settings import LossSettings
from services.learner.mismatch import Mismatch, RowGaps, by_sampler, row_gaps
from services.learner.policy import Policy
from services.learner.recompute import Recomputer
from services.learner.reference import Reference
from services.runtime.errors import ConfigError
from services.runtime.log import get_logger
from services.wire.delta import Weights

_log = get_logger("learner.trainer")

AGE_BINS_S = (0, 1, 10, 60, 300, 1800)
"""Where each bin of the ages begins, in seconds; it ends where the next begins, and the last one never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """`applied` is False where loss or gradient was not finite: the masters are then what they were before."""

    applied: bool
    metrics: dict[str, float]
    mismatch: Mapping[str, Mismatch]
    """By sampler, of rows of staleness 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What a step needs of the configuration. `temperature` is the one that the completions were drawn with."""

    optimizer: OptimizerSection
    loss: LossSettings
    temperature: float
    micro_batch_tokens: int
    autocast: bool
    """bfloat16 forward passes; log-probs and masters stay float32."""
    recompute_versions: int = 0
    """Versions whose log-probs are computed here again instead of taken from the samplers; 0 takes the samplers'."""


class Trainer:
    """Owns the optimizer. Not safe for two steps at once. `reference` is needed where the loss has
    kl_target = "reference": another model with the weights that the run began with."""

    def __init__(self, policy: Policy, settings: TrainerSettings, reference: Policy | None = None) -> None:
        self._policy = policy
        self._settings = settings
        self._forward = Forward(policy, settings.temperature, settings.autocast)
        self._parameters = [tensor for tensor in policy.model.parameters() if tensor.requires_grad]
        knobs = settings.optimizer
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=knobs.lr, betas=knobs.betas, eps=knobs.eps, weight_decay=knobs.weight_decay
        )
        self.steps_taken = 0
        """Applied steps: what warm-up counts."""
        self._reference = None
        if reference is not None:
            self._reference = Reference(
                reference,
                temperature=settings.temperature,
                autocast=settings.autocast,
                micro_batch_tokens=settings.micro_batch_tokens,
            )
        self._recomputer = None
        if settings.recompute_versions:
            self._recomputer = Recomputer(
                policy,
                temperature=settings.temperature,
                autocast=settings.autocast,
                versions=settings.recompute_versions,
                micro_batch_tokens=settings.micro_batch_tokens,
            )

    def published(self, version: int, weights: Weights) -> None:
        """Tells of the weights that samplers draw with from now on."""
        if self._recomputer is not None:
            self._recomputer.hold(version, weights)

    def step(self, groups: Sequence[TrainGroup]) -> StepResult:
        """One AdamW step on `groups`. Raises ConfigError where they do not fit the loss's settings."""
        started = time.perf_counter()
        batch = build_batch(groups)
        reported_BT = batch.loss_inputs.sampler_logprobs_BT
        recomputed: dict[str, float] = {}
        if self._recomputer is not None:
            batch, recomputed["recomputed_share"] = self._recomputer.recomputed(groups, batch)
        if self._reference is not None:
            batch = self._reference.filled(batch)
        device = self._policy.device
        try:
            prepared = prepare(batch.loss_inputs, self._settings.loss).to(device)
        except ValueError as error:
            raise ConfigError(
                f"this run's groups do not fit [loss]: {error}. Set another [loss]; or mend the reward, and move "
                "journal.sqlite3* out of run.state_dir, since it keeps what the old one scored"
            ) from None
        self.optimizer.zero_grad(set_to_none=True)
        partials: list[PartialMetrics] = []
        gaps: list[tuple[Tensor, RowGaps]] = []
        for micro in micro_batches(batch, self._settings.micro_batch_tokens):
            mask_bt = batch.loss_inputs.mask_BT[micro.index_b, : micro.columns]
            logprobs_bt, entropy_bt = self._forward(micro, mask_bt)
            rows = prepared.rows(micro.index_b.to(device), micro.columns)
            output = loss_of(rows, logprobs_bt, entropy_bt)
            output.loss.backward()
            partials.append(output.metrics)
            sampler_bt = reported_BT[micro.index_b, : micro.columns]
            gaps.append((micro.index_b, row_gaps(logprobs_bt.detach(), sampler_bt, mask_bt)))
        metrics = finish_metrics(partials)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.optimizer.max_grad_norm)
        metrics["grad_norm"] = float(norm)
        applied = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        metrics["lr"] = self._apply() if applied else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        metrics |= group_metrics(groups, batch) | recomputed
        metrics["step_s"] = time.perf_counter() - started
        metrics["tokens_per_s"] = float(batch.loss_inputs.mask_BT.sum()) / metrics["step_s"]
        inputs = batch.loss_inputs
        mismatch = by_sampler(groups, inputs.group_B, inputs.mask_BT.sum(1), gaps)
        return StepResult(applied=applied, metrics=metrics, mismatch=mismatch)

    def _apply(self) -> float:
        """Steps the optimizer at the learning rate of this step, and returns the rate."""
        knobs = self._settings.optimizer
        rate = knobs.lr * min(1.0, (self.steps_taken + 1) / max(1, knobs.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps_taken += 1
        return rate

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and counters by parameter name; not copies."""
        names = {id(tensor): name for name, tensor in self._policy.parameters().items()}
        tensors: dict[str, Tensor] = {}
        for parameter, slots in self.optimizer.state.items():
            for slot, value in cast("Mapping[str, Tensor]", slots).items():
                tensors[f"{slot}/{names[id(parameter)]}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], steps_taken: int) -> None:
        """The inverse of `state`, with the number of applied steps. Raises KeyError for an unknown parameter."""
        parameters = self._policy.parameters()
        for key, value in tensors.items():
            slot, _, name = key.partition("/")
            parameter = parameters[name]
            on_device = value if slot == "step" else value.to(parameter.device)
            self.optimizer.state[cast(torch.nn.Parameter, parameter)][slot] = on_device.clone()
        self.steps_taken = steps_taken


def group_metrics(groups: Sequence[TrainGroup], batch: RowBatch) -> dict[str, float]:
    """What a step reports about its groups: rewards, staleness and ages (each with its histogram), lengths."""
    rewards_B = batch.loss_inputs.rewards_B
    lengths_B = batch.loss_inputs.mask_BT.sum(1).double()
    overlong_B = batch.loss_inputs.overlong_B
    ages = [item.age_s for item in groups]
    staleness = [item.staleness for item in groups]
    metrics = {
        "groups": float(len(groups)),
        "reward_mean": float(rewards_B.mean()),
        "reward_std": float(rewards_B.std(unbiased=False)),
        "staleness_mean": sum(staleness) / len(staleness),
        "staleness_max": float(max(staleness)),
        "age_mean_s": sum(ages) / len(ages),
        "age_max_s": max(ages),
        "completion_tokens": float(lengths_B.sum()),
        "completion_tokens_mean": float(lengths_B.mean()),
        "completion_tokens_max": float(lengths_B.max()),
        "overlong_share": 0.0 if overlong_B is None else float(overlong_B.double().mean()),
    }
    age_bins = Counter(bisect.bisect_right(AGE_BINS_S, max(age, 0.0)) - 1 for age in ages)
    metrics |= {f"age_{first}s": float(age_bins[place]) for place, first in enumerate(AGE_BINS_S)}
    return metrics | {f"staleness_{versions}": float(count) for versions, count in sorted(Counter(staleness).items())}

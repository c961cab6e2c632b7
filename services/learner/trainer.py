"""One optimizer step: groups to rows, rows to micro-batches, gradients to masters.

    groups ─► build_batch ─► prepare (once) ─► for each micro-batch: forward ─► loss_of ─► backward ─► clip ─► AdamW

The loss of the batch is the sum over its micro-batches, so that the result does not depend on the cut. Everything here
blocks: the learner calls `step` in a thread.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from services.learner.batches import MicroBatch, RowBatch, TrainGroup, build_batch, micro_batches
from services.learner.config import OptimizerSection
from services.learner.forward import Forward
from services.learner.losses.evaluate import loss_of
from services.learner.losses.metrics import PartialMetrics, finish_metrics
from services.learner.losses.prepare import prepare
from services.learner.losses.settings import LossSettings
from services.learner.policy import Policy
from services.runtime.log import get_logger

_log = get_logger("learner.trainer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """|log p - log q| over a sampler's tokens of staleness 0, in nats."""

    total: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """`applied` is False where loss or gradient was not finite: the masters are then what they were before."""

    applied: bool
    metrics: dict[str, float]
    mismatch: Mapping[str, Mismatch]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What a step needs of the configuration. `temperature` is the one that the completions were drawn with."""

    optimizer: OptimizerSection
    loss: LossSettings
    temperature: float
    micro_batch_tokens: int
    autocast: bool
    """bfloat16 forward passes; log-probs and masters stay float32."""


class Trainer:
    """Owns the optimizer. Not safe for two steps at once."""

    def __init__(self, policy: Policy, settings: TrainerSettings) -> None:
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

    def step(self, groups: Sequence[TrainGroup]) -> StepResult:
        """One AdamW step on `groups`. Raises ValueError where the groups do not fit the loss's settings."""
        started = time.perf_counter()
        batch = build_batch(groups)
        device = self._policy.device
        prepared = prepare(batch.loss_inputs, self._settings.loss).to(device)
        self.optimizer.zero_grad(set_to_none=True)
        partials: list[PartialMetrics] = []
        gaps: list[tuple[Tensor, Tensor]] = []
        for micro in micro_batches(batch, self._settings.micro_batch_tokens):
            mask_bt = batch.loss_inputs.mask_BT[micro.index_b, : micro.columns]
            logprobs_bt, entropy_bt = self._forward(micro, mask_bt)
            rows = prepared.rows(micro.index_b.to(device), micro.columns)
            output = loss_of(rows, logprobs_bt, entropy_bt)
            output.loss.backward()
            partials.append(output.metrics)
            gaps.append((micro.index_b, _gap_b(logprobs_bt.detach(), batch, micro)))
        metrics = finish_metrics(partials)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.optimizer.max_grad_norm)
        metrics["grad_norm"] = float(norm)
        applied = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        metrics["lr"] = self._apply() if applied else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        metrics |= group_metrics(groups, batch)
        metrics["step_s"] = time.perf_counter() - started
        metrics["tokens_per_s"] = float(batch.loss_inputs.mask_BT.sum()) / metrics["step_s"]
        return StepResult(applied=applied, metrics=metrics, mismatch=_mismatch(groups, batch, gaps))

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
    """What a step reports about its groups: rewards, staleness (with its histogram), ages, lengths."""
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
    return metrics | {f"staleness_{versions}": float(count) for versions, count in sorted(Counter(staleness).items())}


def _gap_b(logprobs_bt: Tensor, batch: RowBatch, micro: MicroBatch) -> Tensor:
    """Sum over each row's completion of |log p - log q|, [b] on the CPU."""
    inputs = batch.loss_inputs
    mask_bt = inputs.mask_BT[micro.index_b, : micro.columns]
    sampler_bt = inputs.sampler_logprobs_BT[micro.index_b, : micro.columns]
    return torch.where(mask_bt, (logprobs_bt.cpu() - sampler_bt).abs(), 0.0).double().sum(1)


def _mismatch(
    groups: Sequence[TrainGroup], batch: RowBatch, gaps: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Mismatch]:
    """By sampler, over rows of staleness 0: there learner and sampler hold the same policy."""
    gap_B = torch.zeros(len(batch), dtype=torch.float64)
    for index_b, gap_b in gaps:
        gap_B[index_b] = gap_b
    found: dict[str, Mismatch] = {}
    columns = (batch.loss_inputs.group_B, gap_B, batch.loss_inputs.mask_BT.sum(1))
    for number, gap, tokens in zip(*(column.tolist() for column in columns), strict=True):
        item = groups[number]
        if item.staleness == 0:
            before = found.get(item.sampler_id, Mismatch(total=0.0, tokens=0))
            found[item.sampler_id] = Mismatch(total=before.total + gap, tokens=before.tokens + tokens)
    return found

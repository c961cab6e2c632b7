"""How far an engine's log-probs are from the trainer's on the same tokens: two implementations of one policy.

Measured where both hold the same version (staleness 0). What remains is rounding: of the engine's kernels, of weights
that travel as bf16 while the masters are float32. docs/engines.md says what is usual.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from services.learner.batches import TrainGroup

_CAP = 20.0
"""Nats at which the KL term is capped: a broken engine must show as large, not as infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Of one sampler's tokens of staleness 0 in one step, in nats."""

    tokens: int
    mean: float
    """Of |log p - log q|."""
    largest: float
    """Of |log p - log q|."""
    kl: float
    """Estimate of KL(q‖p) per token: mean of p/q - 1 - log(p/q), never below 0 (k3, joschu.net/blog/kl-approx)."""


class RowGaps(NamedTuple):
    """Sums and the maximum over each row's completion, float64 [b] on the CPU."""

    total_b: Tensor
    largest_b: Tensor
    kl_b: Tensor


def row_gaps(learner_bt: Tensor, sampler_bt: Tensor, mask_bt: Tensor) -> RowGaps:
    """learner_bt: log-probs of the current policy; sampler_bt: the engine's; mask_bt: completion tokens."""
    gap_bt = torch.where(mask_bt, (learner_bt.cpu() - sampler_bt).double(), 0.0)
    kl_bt = torch.expm1(gap_bt.clamp(max=_CAP)) - gap_bt
    return RowGaps(gap_bt.abs().sum(1), gap_bt.abs().amax(1), kl_bt.sum(1))


def by_sampler(
    groups: Sequence[TrainGroup], group_B: Tensor, length_B: Tensor, parts: Sequence[tuple[Tensor, RowGaps]]
) -> Mapping[str, Mismatch]:
    """From the gaps of micro-batches (`index_b`, gaps). length_B: completion tokens of each row."""
    gaps_B3 = torch.zeros((len(group_B), 3), dtype=torch.float64)
    for index_b, gaps in parts:
        gaps_B3[index_b] = torch.stack(gaps, dim=1)
    rows: dict[str, list[int]] = {}
    for row, number in enumerate(group_B.tolist()):
        if groups[number].staleness == 0:
            rows.setdefault(groups[number].sampler_id, []).append(row)
    found: dict[str, Mismatch] = {}
    for sampler_id, own in rows.items():
        tokens = int(length_B[own].sum())
        if tokens:
            total, _, kl = (gaps_B3[own].sum(0) / tokens).tolist()
            found[sampler_id] = Mismatch(tokens=tokens, mean=total, largest=float(gaps_B3[own, 1].max()), kl=kl)
    return found

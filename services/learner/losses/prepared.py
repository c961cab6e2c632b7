"""A batch whose group statistics are settled: what every micro-batch, in any cut, takes its rows from."""

from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from services.learner.losses.settings import Advantage, Aggregation, LossName, LossSettings, SequenceLogprob


class Exclusion(IntEnum):
    """Why a row takes no part in the loss; the first reason that holds is the one that is counted."""

    NONE = 0
    EMPTY = 1
    """No completion token."""
    SAMPLER_NONFINITE = 2
    """A sampler's log-prob is NaN or infinite."""
    SAMPLER_POSITIVE = 3
    """A sampler's log-prob is above 0 by more than rounding."""
    OTHER_NONFINITE = 4
    """A reference's or proximal policy's log-prob is NaN or infinite."""
    REWARD_NONFINITE = 5
    """The reward is NaN or infinite."""
    OVERLONG = 6
    """Cut at the token limit, and `mask_overlong` is on."""
    ZERO_VARIANCE = 7
    """Its group's rewards are all equal, and `zero_variance` is drop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dials:
    """The settings with every unset key filled from the loss's row in the table."""

    name: LossName
    clip_low: float
    clip_high: float
    aggregation: Aggregation
    advantage: Advantage
    sequence_logprob: SequenceLogprob
    weight_cap: float
    weight_floor: float
    settings: LossSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Rows with their statistics, all without gradient; floats are float64.

    A row that takes no part has an empty mask and coefficient 0. `rows` cuts any subset, in any order.
    """

    dials: Dials
    mask_BT: Tensor
    """bool: tokens that count."""
    sampler_logprobs_BT: Tensor
    """0 where the mask is false."""
    proximal_logprobs_BT: Tensor | None
    reference_logprobs_BT: Tensor | None
    length_B: Tensor
    advantage_B: Tensor
    log_q_B: Tensor
    """s_q: log-prob of the sequence under its sampler, mean or sum over tokens as the dials say."""
    log_expected_q_B: Tensor
    """log E of the row's group."""
    log_max_q_B: Tensor
    """max_j s_q,j of the row's group."""
    log_mean_q_B: Tensor
    coefficient_B: Tensor
    """Weight of one token of the row in the batch's loss."""
    reason_B: Tensor
    """int64: an `Exclusion` per row."""
    dropped_share_B: Tensor
    """1 / group size for rows of groups without any row left: sums to the number of dropped groups."""
    flat_share_B: Tensor
    """1 / group size for rows of groups whose rewards are all equal."""
    staleness_B: Tensor | None

    def __len__(self) -> int:
        return self.mask_BT.shape[0]

    def rows(self, index: Tensor, tokens: int | None = None) -> "Prepared":
        """The rows at `index` (int64 [b], on the same device), cut to the first `tokens` columns where given.

        Raises ValueError where the cut would lose tokens that count.
        """
        if tokens is not None and bool(self.mask_BT[index][:, tokens:].any()):
            raise ValueError(f"a row has completion tokens beyond column {tokens}")
        changes = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                picked = value[index]
                changes[field.name] = picked[:, :tokens] if picked.ndim == 2 else picked
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> "Prepared":
        """The same on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)})


def sequence_logprob(logprobs_BT: Tensor, mask_BT: Tensor, kind: SequenceLogprob) -> Tensor:
    """s: mean or sum of the masked log-probs, [B]; 0 for an empty row. Entries outside the mask must be 0."""
    total_B = logprobs_BT.sum(1)
    return total_B if kind is SequenceLogprob.SUM else total_B / mask_BT.sum(1).clamp(min=1)

"""The pieces that losses are composed of: log-ratios, capped weights, the clipped surrogate.

A loss function takes `Rows` and returns `Terms`; it never reduces over rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.learner.losses.prepared import Dials, Prepared, sequence_logprob

MAX_LOG_WEIGHT = 80.0
"""Log-ratios above this are cut, value and gradient, so that one broken token makes a large loss and not inf:
exp(80) = 5.5e34 still fits float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One micro-batch as a loss function sees it: float64, 0 outside the mask, no NaN."""

    log_p_BT: Tensor
    """Learner's log-probs: the only tensor with a gradient."""
    log_q_BT: Tensor
    mask_BT: Tensor
    prepared: Prepared

    @property
    def dials(self) -> Dials:
        return self.prepared.dials

    @property
    def advantage_B(self) -> Tensor:
        return self.prepared.advantage_B

    @property
    def advantage_B1(self) -> Tensor:
        return self.prepared.advantage_B[:, None]

    @property
    def log_ratio_BT(self) -> Tensor:
        """log r = log p - log q per token."""
        return self.log_p_BT - self.log_q_BT

    @property
    def log_p_B(self) -> Tensor:
        """s_p of each sequence."""
        return self.sequence_logprob(self.log_p_BT)

    @property
    def log_q_B(self) -> Tensor:
        """s_q of each sequence."""
        return self.prepared.log_q_B

    def sequence_logprob(self, logprobs_BT: Tensor) -> Tensor:
        """Mean or sum over each sequence's tokens, [B]."""
        return sequence_logprob(logprobs_BT, self.mask_BT, self.dials.sequence_logprob)

    @property
    def proximal_BT(self) -> Tensor:
        """The proximal policy's log-probs, detached; the learner's own where none were given."""
        given_BT = self.prepared.proximal_logprobs_BT
        return self.log_p_BT.detach() if given_BT is None else given_BT


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a loss function makes of rows: per token ([B, T]) or per sequence ([B])."""

    objective: Tensor
    """To be maximised; carries the gradient."""
    weight: Tensor
    """Importance weight before clipping, detached: [B] or [B, T]."""
    cut: Tensor
    """bool: terms that the clip, cap or mask keeps from acting with their full weight: [B] or [B, T]."""


def capped_exp(log_weight: Tensor) -> Tensor:
    """exp with the log cut at `MAX_LOG_WEIGHT`."""
    return log_weight.clamp(max=MAX_LOG_WEIGHT).exp()


def clipped_surrogate(log_weight: Tensor, advantage: Tensor, dials: Dials) -> Terms:
    """min(w A, clip(w, 1 - ε_low, 1 + ε_high) A), PPO (arXiv 1707.06347, eq. 7): no gradient where the clip acts."""
    weight = capped_exp(log_weight)
    low, high = 1.0 - dials.clip_low, 1.0 + dials.clip_high
    cut = ((advantage > 0.0) & (weight > high)) | ((advantage < 0.0) & (weight < low))
    bound = torch.where(advantage > 0.0, high, torch.full_like(advantage, low))  # two scalars would give float32
    return Terms(objective=torch.where(cut, bound * advantage, weight * advantage), weight=weight.detach(), cut=cut)

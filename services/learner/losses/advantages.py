"""Advantages: what a reward is worth beside the other rewards of its group. No gradient flows through them."""

import torch
from torch import Tensor

from services.learner.losses.groups import Groups
from services.learner.losses.settings import Advantage, BetaShape, LossSettings

MAX_INVERSE_DENSITY = 1e6
"""The bound of the authors' code on BNPO's factor 1/f."""
ROUNDING = 1e-6
"""What a weighted sum of shares may miss the ends of [0, 1] by."""


def advantages(
    rewards_B: Tensor,
    parts_BK: Tensor | None,
    groups: Groups,
    keep_B: Tensor,
    rule: Advantage,
    settings: LossSettings,
) -> Tensor:
    """Advantages of all rows, float64 [B]; rows outside `keep_B` (no valid reward) get 0.

    With several rewards per row (`parts_BK`) each part gets its own advantage and the row their mean, so that a part
    with a large scale cannot drown the others (BNPO's advantage decomposition, arXiv 2506.02864).
    """
    columns = [rewards_B] if parts_BK is None else list(parts_BK.unbind(1))
    total_B = torch.stack([_of_one(column.double(), groups, keep_B, rule, settings) for column in columns]).mean(0)
    return torch.where(keep_B, total_B, 0.0)


def _of_one(rewards_B: Tensor, groups: Groups, keep_B: Tensor, rule: Advantage, settings: LossSettings) -> Tensor:
    rewards_B = torch.where(keep_B, rewards_B, 0.0)
    mean_P = groups.mean(rewards_B, keep_B)
    centred_B = torch.where(flat_rows(rewards_B, groups, keep_B), 0.0, rewards_B - groups.spread(mean_P))
    if rule is Advantage.MEAN:
        return centred_B
    if rule is Advantage.MEAN_STD:
        return centred_B / (_std(centred_B, groups, keep_B) + settings.advantage_epsilon).clamp(min=1e-300)
    return centred_B * groups.spread(_inverse_density(rewards_B, mean_P, groups, keep_B, settings.bnpo_shape))


def flat_rows(rewards_B: Tensor, groups: Groups, keep_B: Tensor) -> Tensor:
    """bool [B]: rows of groups whose kept rewards are all equal; exact, so that rounding makes no advantage."""
    return groups.spread(groups.max(rewards_B, keep_B) == -groups.max(-rewards_B, keep_B))


def _std(centred_B: Tensor, groups: Groups, keep_B: Tensor) -> Tensor:
    """Standard deviation with n - 1, as torch.std and the published code have it: [B]."""
    squares_P = groups.sum(torch.where(keep_B, centred_B.square(), 0.0))
    return groups.spread((squares_P / (groups.size(keep_B) - 1.0).clamp(min=1.0)).sqrt())


def _inverse_density(rewards_B: Tensor, mean_P: Tensor, groups: Groups, keep_B: Tensor, shape: BetaShape) -> Tensor:
    """1 / f(p; α, β) at each group's mean reward p, f a Beta density: [P].

    (a, b) are the moments of the batch's group means; one group, or no spread, gives α = β = 1, which is no
    normalisation. Rewards must lie in [0, 1].
    """
    if bool((keep_B & ((rewards_B < -ROUNDING) | (rewards_B > 1.0 + ROUNDING))).any()):
        raise ValueError("the bnpo advantage needs rewards between 0 and 1")
    one = torch.ones((), dtype=torch.float64, device=mean_P.device)
    alpha, beta = one, one
    scored_P = mean_P[groups.sum(keep_B) > 0.0]
    variance = scored_P.var() if scored_P.numel() > 1 else one * 0.0
    if float(variance) > 0.0:
        centre = scored_P.mean()
        spread = (centre * (1.0 - centre) / variance - 1.0).clamp(min=0.0)
        a, b = spread * centre, spread * (1.0 - centre)
        if shape is BetaShape.SUM_THIRD:
            alpha, beta = (1.0 + a) / 3.0, (1.0 + b) / 3.0
        else:
            alpha, beta = 1.0 + a / 3.0, 1.0 + b / 3.0
    log_beta = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    inside_P = mean_P.clamp(1e-12, 1.0 - 1e-12)
    log_f_P = (alpha - 1.0) * inside_P.log() + (beta - 1.0) * torch.log1p(-inside_P) - log_beta
    return (-log_f_P).exp().clamp(max=MAX_INVERSE_DENSITY)

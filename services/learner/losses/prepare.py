"""Phase one, once per batch: who takes part, advantages, E per group, normalisers."""

import torch
from torch import Tensor

from services.learner.losses.advantages import advantages, flat_rows
from services.learner.losses.aggregate import token_coefficients
from services.learner.losses.batch import Batch, check
from services.learner.losses.groups import Groups, log_expected_q, log_mean_q
from services.learner.losses.prepared import Exclusion, Prepared, sequence_logprob
from services.learner.losses.settings import LossSettings, ZeroVariance
from services.learner.losses.table import dials_of

POSITIVE_TOLERANCE = 1e-4
"""Rounding that a log-prob may stand above 0, nats."""


@torch.no_grad()
def prepare(batch: Batch, settings: LossSettings) -> Prepared:
    """Settles all that needs more than one row. Over several ranks, give every rank the whole batch (it is small).

    Raises ValueError, one sentence, where shapes or groups do not fit, a group has one row, or a needed tensor is
    missing.
    """
    check(batch)
    dials = dials_of(settings)
    groups = Groups.of(batch.group_B)
    reference_BT = batch.reference_logprobs_BT if settings.wants_reference else None
    if settings.wants_reference and reference_BT is None:
        raise ValueError('kl_target = "reference" needs the reference model\'s log-probs')

    scored_B = _finite_rewards(batch)
    flat_B = flat_rows(torch.where(scored_B, batch.rewards_B.double(), 0.0), groups, scored_B)
    reason_B = _reasons(batch, reference_BT, scored_B)
    in_expectation_B = reason_B == Exclusion.NONE  # what follows leaves the loss, but its q is a fair sample
    if settings.mask_overlong and batch.overlong_B is not None:
        reason_B = _mark(reason_B, batch.overlong_B.bool(), Exclusion.OVERLONG)
    if settings.zero_variance is ZeroVariance.DROP:
        reason_B = _mark(reason_B, flat_B, Exclusion.ZERO_VARIANCE)
    part_B = reason_B == Exclusion.NONE

    sampler_BT = torch.where(batch.mask_BT & in_expectation_B[:, None], batch.sampler_logprobs_BT.double(), 0.0)
    log_q_B = sequence_logprob(sampler_BT, batch.mask_BT, dials.sequence_logprob)
    mask_BT = batch.mask_BT & part_B[:, None]
    length_B = mask_BT.sum(1).double()
    group_share_B = 1.0 / groups.spread(groups.size(torch.ones_like(part_B)))
    return Prepared(
        dials=dials,
        mask_BT=mask_BT,
        sampler_logprobs_BT=torch.where(mask_BT, sampler_BT, 0.0),
        proximal_logprobs_BT=_clean(batch.proximal_logprobs_BT, mask_BT),
        reference_logprobs_BT=_clean(reference_BT, mask_BT),
        length_B=length_B,
        advantage_B=advantages(batch.rewards_B, batch.reward_parts_BK, groups, scored_B, dials.advantage, settings),
        log_q_B=log_q_B,
        log_expected_q_B=log_expected_q(groups, log_q_B, in_expectation_B),
        log_max_q_B=_finite(groups.spread(groups.max(log_q_B, in_expectation_B))),
        log_mean_q_B=log_mean_q(groups, log_q_B, in_expectation_B),
        coefficient_B=token_coefficients(
            dials.aggregation, length_B, settings.max_completion_tokens, settings.delta_l_alpha
        ),
        reason_B=reason_B,
        dropped_share_B=torch.where(groups.spread(groups.sum(part_B)) == 0.0, group_share_B, 0.0),
        flat_share_B=torch.where(flat_B, group_share_B, 0.0),
        staleness_B=None if batch.staleness_B is None else batch.staleness_B.double(),
    )


def _finite_rewards(batch: Batch) -> Tensor:
    finite_B = torch.isfinite(batch.rewards_B)
    parts_BK = batch.reward_parts_BK
    return finite_B if parts_BK is None else finite_B & torch.isfinite(parts_BK).all(1)


def _reasons(batch: Batch, reference_BT: Tensor | None, scored_B: Tensor) -> Tensor:
    """The reasons that also keep a row out of E, int64 [B]."""
    mask_BT = batch.mask_BT
    reason_B = torch.full(scored_B.shape, int(Exclusion.NONE), dtype=torch.int64, device=mask_BT.device)
    reason_B = _mark(reason_B, ~mask_BT.any(1), Exclusion.EMPTY)
    sampler_BT = torch.where(mask_BT, batch.sampler_logprobs_BT.double(), 0.0)
    reason_B = _mark(reason_B, ~torch.isfinite(sampler_BT).all(1), Exclusion.SAMPLER_NONFINITE)
    reason_B = _mark(reason_B, (sampler_BT > POSITIVE_TOLERANCE).any(1), Exclusion.SAMPLER_POSITIVE)
    for other_BT in (reference_BT, batch.proximal_logprobs_BT):
        if other_BT is not None:
            broken_B = ~torch.isfinite(torch.where(mask_BT, other_BT, 0.0)).all(1)
            reason_B = _mark(reason_B, broken_B, Exclusion.OTHER_NONFINITE)
    return _mark(reason_B, ~scored_B, Exclusion.REWARD_NONFINITE)


def _mark(reason_B: Tensor, where_B: Tensor, reason: Exclusion) -> Tensor:
    return torch.where((reason_B == Exclusion.NONE) & where_B, int(reason), reason_B)


def _clean(logprobs_BT: Tensor | None, mask_BT: Tensor) -> Tensor | None:
    return None if logprobs_BT is None else torch.where(mask_BT, logprobs_BT.double(), 0.0)


def _finite(values_B: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values_B), values_B, 0.0)

"""Losses with one weight per sequence: S = exp(s_p - s_q), s the mean log-prob (or sum, as `sequence_logprob` says)."""

import math

import torch

from services.learner.losses.kl import kl_terms
from services.learner.losses.ratio import Rows, Terms, capped_exp, clipped_surrogate
from services.learner.losses.settings import KlEstimator


def gspo(rows: Rows) -> Terms:
    """min(S A, clip(S) A), [B]. Gradient through s_p. GSPO, arXiv 2507.18071, eq. 5 and 7."""
    return clipped_surrogate(rows.log_p_B - rows.log_q_B, rows.advantage_B, rows.dials)


def gepo(rows: Rows) -> Terms:
    """min(w A, clip(w) A), w = p / E, E = Σ_j q_j² / Σ_j q_j over the group, [B]. Gradient through s_p; E holds no p.

    GEPO, arXiv 2508.17850. On policy w is not 1 (it is at most (1 + √G)/2), so the clip acts even then.
    """
    return clipped_surrogate(rows.log_p_B - rows.prepared.log_expected_q_B, rows.advantage_B, rows.dials)


def gepo_plus(rows: Rows) -> Terms:
    """gepo, but a sequence whose mean k3 KL is below `gepo_plus_kl` divides by its own q, as gspo does, [B].

    The choice is detached and each row's own. Experimental, from the published code of arXiv 2508.17850.
    """
    k3_BT = kl_terms(rows.log_p_BT, rows.log_q_BT, KlEstimator.K3).detach()
    k3_B = torch.where(rows.mask_BT, k3_BT, 0.0).sum(1) / rows.mask_BT.sum(1).clamp(min=1)
    near_B = k3_B < rows.dials.settings.gepo_plus_kl
    log_denominator_B = torch.where(near_B, rows.log_q_B, rows.prepared.log_expected_q_B)
    return clipped_surrogate(rows.log_p_B - log_denominator_B, rows.advantage_B, rows.dials)


def gepo_fresh(rows: Rows) -> Terms:
    """min(w A, clip(w) A), w = p / D, log D = (1 - λ) log q_i + λ log max_j q_j, λ = 1 - exp(-(τ / τ0)²), [B].

    τ is the row's staleness in versions, τ0 = `fresh_versions`; rows without staleness, or τ0 = 0, have λ = 1. D holds
    no p. w is never above gspo's weight, and at λ = 1 never above gepo's either: docs/gepo.md, "Beyond the paper".
    """
    fresh, staleness_B = rows.dials.settings.fresh_versions, rows.prepared.staleness_B
    log_q_B, log_max_q_B = rows.log_q_B, rows.prepared.log_max_q_B
    if staleness_B is None or fresh == 0.0:
        return clipped_surrogate(rows.log_p_B - log_max_q_B, rows.advantage_B, rows.dials)
    own_B = torch.exp(-((staleness_B / fresh) ** 2))
    log_denominator_B = own_B * log_q_B + (1.0 - own_B) * log_max_q_B
    return clipped_surrogate(rows.log_p_B - log_denominator_B, rows.advantage_B, rows.dials)


def defensive(rows: Rows) -> Terms:
    """min(w A, clip(w) A), w = p / ((1 - η) q + η sg[p]) ≤ 1/η, [B]. The p below is detached: gradient of w is w ∇s_p.

    "Defensive sampling" of the published code of arXiv 2508.17850, after Owen & Zhou (2000).
    """
    eta = rows.dials.settings.eta
    own_B = math.log(eta) + rows.log_p_B.detach()
    log_denominator_B = torch.logaddexp(math.log1p(-eta) + rows.log_q_B, own_B)
    return clipped_surrogate(rows.log_p_B - log_denominator_B, rows.advantage_B, rows.dials)


def gmpo(rows: Rows) -> Terms:
    """A · exp(mean_t c(log r_t)), [B]: geometric mean of ratios, each clipped in log space where A pushes it.

    c(d) = min(d, clip_high) for A > 0, max(d, -clip_low) for A < 0: no gradient where it acts. The reported weight is
    the unclipped mean. GMPO, arXiv 2507.20673, and its code.
    """
    d_BT, advantage_B1 = rows.log_ratio_BT, rows.advantage_B1
    high, low = rows.dials.clip_high, -rows.dials.clip_low
    cut_BT = ((advantage_B1 > 0.0) & (d_BT > high)) | ((advantage_B1 < 0.0) & (d_BT < low))
    bound_B1 = torch.where(advantage_B1 > 0.0, high, torch.full_like(advantage_B1, low))
    bounded_BT = torch.where(cut_BT, bound_B1, d_BT)
    length_B = rows.mask_BT.sum(1).clamp(min=1)
    mean_B = torch.where(rows.mask_BT, bounded_BT, 0.0).sum(1) / length_B
    weight_B = capped_exp((d_BT.sum(1) / length_B).detach())
    return Terms(objective=capped_exp(mean_B) * rows.advantage_B, weight=weight_B, cut=cut_BT)

"""Losses whose terms are tokens, r = p/q; the advantage is the sequence's."""

import torch
from torch import Tensor

from services.learner.losses.ratio import Rows, Terms, capped_exp, clipped_surrogate


def grpo(rows: Rows) -> Terms:
    """min(r A, clip(r) A), [B, T]. Gradient through r. GRPO, arXiv 2402.03300, eq. 3.

    dr_grpo (arXiv 2503.20783) and bnpo (arXiv 2506.02864) are this term under another aggregation and advantage.
    """
    return clipped_surrogate(rows.log_ratio_BT, rows.advantage_B1, rows.dials)


def gspo_token(rows: Rows) -> Terms:
    """min(S_t A, clip(S_t) A), S_t = sg[S] · p_t / sg[p_t], [B, T]: the sequence's weight, the token's gradient.

    Equal to gspo, in value and gradient, as long as A is the sequence's and s a mean.
    GSPO-token, arXiv 2507.18071, eq. 13 and 14.
    """
    log_s_B = (rows.log_p_B - rows.log_q_B).detach()
    log_weight_BT = log_s_B[:, None] + rows.log_p_BT - rows.log_p_BT.detach()
    terms = clipped_surrogate(log_weight_BT, rows.advantage_B1, rows.dials)
    return Terms(objective=terms.objective, weight=capped_exp(log_s_B), cut=terms.cut)


def cispo(rows: Rows) -> Terms:
    """sg[min(r, 1 + ε_high)] · A · log p, [B, T]: the weight is cut, never the gradient.

    CISPO, arXiv 2506.13585 (MiniMax-M1), eq. 4 and 5, which leaves out the lower bound.
    """
    weight_BT = capped_exp(rows.log_ratio_BT.detach())
    bound = 1.0 + rows.dials.clip_high
    objective_BT = weight_BT.clamp(max=bound) * rows.advantage_B1 * rows.log_p_BT
    return Terms(objective=objective_BT, weight=weight_BT, cut=weight_BT > bound)


def topr(rows: Rows) -> Terms:
    """A · log p for A ≥ 0, sg[min(p/q, 1)] · A · log p for A < 0, [B, T]; p/q is the whole sequence's.

    TOPR, arXiv 2503.14286: the ratio is the trajectory's, so `sequence_logprob` is sum unless set.
    """
    ratio_B = capped_exp((rows.log_p_B - rows.log_q_B).detach())
    negative_B = rows.advantage_B < 0.0
    weight_B = torch.where(negative_B, ratio_B.clamp(max=1.0), 1.0)
    objective_BT = (weight_B * rows.advantage_B)[:, None] * rows.log_p_BT
    return Terms(objective=objective_BT, weight=ratio_B, cut=negative_B & (ratio_B > 1.0))


def decoupled_ppo(rows: Rows) -> Terms:
    """sg[prox/q] · min(u A, clip(u) A), u = p/prox, [B, T]: the clip is centred on the proximal policy, not on q.

    AReaL, arXiv 2505.24298; after Hilton et al., arXiv 2110.00641. Without proximal log-probs the current
    policy, detached, is the proximal one: value r A and gradient r A ∇log p.
    """
    correction_BT = _mismatch(rows)
    return _corrected(rows, correction_BT, torch.zeros_like(rows.mask_BT))


def tis(rows: Rows) -> Terms:
    """sg[min(prox/q, C)] · min(u A, clip(u) A), [B, T]: truncated importance sampling (Ionides 2008; verl, slime)."""
    correction_BT, cap = _mismatch(rows), rows.dials.weight_cap
    return _corrected(rows, correction_BT.clamp(max=cap), correction_BT > cap)


def icepop(rows: Rows) -> Terms:
    """sg[m · prox/q] · min(u A, clip(u) A), m = 1 where floor ≤ prox/q ≤ C, else 0, [B, T].

    IcePop, of Ring-1T (arXiv 2510.18855).
    """
    correction_BT = _mismatch(rows)
    outside_BT = (correction_BT > rows.dials.weight_cap) | (correction_BT < rows.dials.weight_floor)
    return _corrected(rows, torch.where(outside_BT, 0.0, correction_BT), outside_BT)


def seq_mask(rows: Rows) -> Terms:
    """sg[m · ρ] · min(u A, clip(u) A), ρ = the sequence's prox/q, m = 1 where ρ ≤ C, else 0, [B, T].

    Masked importance sampling of whole sequences (TRL, verl). ρ is length-normalised unless `sequence_logprob` is sum.
    """
    rho_B = capped_exp(rows.sequence_logprob(rows.proximal_BT) - rows.log_q_B)
    outside_B = rho_B > rows.dials.weight_cap
    correction_B = torch.where(outside_B, 0.0, rho_B)
    return _corrected(rows, correction_B[:, None], outside_B[:, None])


def _mismatch(rows: Rows) -> Tensor:
    """prox/q per token, detached."""
    return capped_exp(rows.proximal_BT - rows.log_q_BT)


def _corrected(rows: Rows, correction_BT: Tensor, cut_BT: Tensor) -> Terms:
    """PPO's term against the proximal policy, times a detached correction towards q; the reported weight is p/q."""
    inner = clipped_surrogate(rows.log_p_BT - rows.proximal_BT, rows.advantage_B1, rows.dials)
    return Terms(
        objective=correction_BT * inner.objective,
        weight=capped_exp(rows.log_ratio_BT.detach()),
        cut=cut_BT | inner.cut,
    )

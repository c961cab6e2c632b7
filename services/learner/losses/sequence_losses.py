"""Losses with one weight per sequence: S = exp(s_p - s_q), s the mean log-prob (or sum, as `sequence_logprob` says)."""

from services.learner.losses.ratio import Rows, Terms, clipped_surrogate


def gspo(rows: Rows) -> Terms:
    """min(S A, clip(S) A), [B]. Gradient through s_p. GSPO, arXiv 2507.18071, eq. 5 and 7."""
    return clipped_surrogate(rows.log_p_B - rows.log_q_B, rows.advantage_B, rows.dials)


def gepo(rows: Rows) -> Terms:
    """min(w A, clip(w) A), w = p / E, E = Σ_j q_j² / Σ_j q_j over the group, [B]. Gradient through s_p; E holds no p.

    GEPO, arXiv 2508.17850. On policy w is not 1 (it is at most (1 + √G)/2), so the clip acts even then.
    """
    return clipped_surrogate(rows.log_p_B - rows.prepared.log_expected_q_B, rows.advantage_B, rows.dials)

"""Losses with one weight per token, r = p/q; the advantage is the sequence's."""

from services.learner.losses.ratio import Rows, Terms, clipped_surrogate


def grpo(rows: Rows) -> Terms:
    """min(r A, clip(r) A), [B, T]. Gradient through r. GRPO, arXiv 2402.03300, eq. 3.

    dr_grpo (arXiv 2503.20783) and bnpo (arXiv 2506.02864) are this term under another aggregation and advantage.
    """
    return clipped_surrogate(rows.log_ratio_BT, rows.advantage_B1, rows.dials)

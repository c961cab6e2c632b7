"""Aggregations: the weight of one token of each row in the batch's loss."""

import torch
from torch import Tensor

from services.learner.losses.settings import Aggregation


def token_coefficients(aggregation: Aggregation, length_B: Tensor, max_tokens: int | None, alpha: float) -> Tensor:
    """c_B, float64: the loss is -Σ_i c_i Σ_t objective_it; a term of a whole sequence weighs c_i · L_i. No gradient.

    Rows of length 0 take no part. N = rows that take part, L = tokens of a row, M = `max_tokens` or the longest L:

        seq_mean    1 / (N L_i)                      GRPO: mean over tokens, then over sequences
        token_mean  1 / Σ_j L_j                      DAPO, BNPO
        dr_grpo     1 / (N M)                        Dr.GRPO (arXiv 2503.20783)
        delta_l     L_i^-α / (M Σ_j L_j^-α)          ΔL (arXiv 2509.07558, least variance of unbiased sums)
    """
    length_B = length_B.double()
    part_B = length_B > 0.0
    safe_B = torch.where(part_B, length_B, 1.0)
    rows = part_B.sum().clamp(min=1).double()
    longest = length_B.max().clamp(min=1.0) if max_tokens is None else length_B.new_tensor(float(max_tokens))
    if aggregation is Aggregation.SEQ_MEAN:
        coefficient_B = 1.0 / (rows * safe_B)
    elif aggregation is Aggregation.TOKEN_MEAN:
        coefficient_B = torch.ones_like(safe_B) / length_B.sum().clamp(min=1.0)
    elif aggregation is Aggregation.DR_GRPO:
        coefficient_B = torch.ones_like(safe_B) / (rows * longest)
    else:
        share_B = torch.where(part_B, safe_B.pow(-alpha), 0.0)
        coefficient_B = share_B / (longest * share_B.sum().clamp(min=1e-300))
    return torch.where(part_B, coefficient_B, 0.0)

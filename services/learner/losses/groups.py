"""Statistics over the rows of one prompt, in float64, for rows in any order."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Which of the P groups each of the B rows belongs to."""

    index_B: Tensor
    count: int

    @classmethod
    def of(cls, group_B: Tensor) -> "Groups":
        numbers, index_B = torch.unique(group_B, return_inverse=True)
        return cls(index_B=index_B, count=numbers.numel())

    def sum(self, values_B: Tensor) -> Tensor:
        """[B] -> [P]."""
        zeros_P = torch.zeros(self.count, dtype=torch.float64, device=values_B.device)
        return zeros_P.index_add(0, self.index_B, values_B.double())

    def size(self, keep_B: Tensor) -> Tensor:
        """Kept rows per group, at least 1 so that it can divide: [P]."""
        return self.sum(keep_B).clamp(min=1.0)

    def mean(self, values_B: Tensor, keep_B: Tensor) -> Tensor:
        """Mean over kept rows; 0 for a group without any: [P]."""
        return self.sum(torch.where(keep_B, values_B.double(), 0.0)) / self.size(keep_B)

    def max(self, values_B: Tensor, keep_B: Tensor) -> Tensor:
        """Largest kept value; -inf for a group without any: [P]."""
        lowest_P = torch.full((self.count,), -torch.inf, dtype=torch.float64, device=values_B.device)
        kept_B = torch.where(keep_B, values_B.double(), -torch.inf)
        return lowest_P.scatter_reduce(0, self.index_B, kept_B, "amax")

    def logsumexp(self, values_B: Tensor, keep_B: Tensor) -> Tensor:
        """log Σ exp over kept rows, shifted by the maximum against underflow; 0 for a group without any: [P]."""
        top_P = self.max(values_B, keep_B)
        top_P = torch.where(torch.isfinite(top_P), top_P, 0.0)
        shifted_B = torch.where(keep_B, values_B.double() - top_P[self.index_B], -torch.inf)
        total_P = self.sum(shifted_B.exp())
        return torch.where(total_P > 0.0, top_P + total_P.clamp(min=1e-300).log(), 0.0)

    def spread(self, values_P: Tensor) -> Tensor:
        """[P] -> [B]."""
        return values_P[self.index_B]


def log_expected_q(groups: Groups, log_q_B: Tensor, keep_B: Tensor) -> Tensor:
    """log E of GEPO (arXiv 2508.17850): E = Σ q² / Σ q over a group's kept rows, q = exp(log_q_B): [B].

    Contraharmonic mean, so min q ≤ mean q ≤ E ≤ max q. It holds no learner's value: nothing to detach.
    """
    log_e_P = groups.logsumexp(2.0 * log_q_B, keep_B) - groups.logsumexp(log_q_B, keep_B)
    return groups.spread(log_e_P)


def log_mean_q(groups: Groups, log_q_B: Tensor, keep_B: Tensor) -> Tensor:
    """log of the arithmetic mean of q over a group's kept rows: [B]."""
    return groups.spread(groups.logsumexp(log_q_B, keep_B) - groups.size(keep_B).log())

"""What a loss reads: one batch of rows, B completions of P prompts, padded to T tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows in any order; what stands where `mask_BT` is false is never read, NaN included."""

    sampler_logprobs_BT: Tensor
    """log q of each token under the policy that drew it, nats, at the temperature that it was drawn with."""
    mask_BT: Tensor
    """bool: completion tokens."""
    rewards_B: Tensor
    group_B: Tensor
    """int64: rows with one number answer one prompt under one policy version. Any numbers."""
    overlong_B: Tensor | None = None
    """bool: completions that were cut at the token limit."""
    reference_logprobs_BT: Tensor | None = None
    """log-probs under a reference model, for `kl_target = "reference"`."""
    proximal_logprobs_BT: Tensor | None = None
    """log-probs under the learner's policy as the step began. Without it the current policy, detached, stands in:
    the same numbers as long as a batch is one optimizer step."""
    staleness_B: Tensor | None = None
    """Learner's version at consumption minus the group's version."""
    reward_parts_BK: Tensor | None = None
    """K rewards per row. The advantage is then the mean of the parts' own advantages (BNPO's decomposition)."""


def check(batch: Batch) -> None:
    """Raises ValueError, one sentence, unless shapes, types and groups fit together."""
    mask = batch.mask_BT
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"the mask must be a bool tensor [B, T], not {mask.dtype} {list(mask.shape)}")
    rows = mask.shape[0]
    if rows == 0:
        raise ValueError("the batch has no rows")
    tokens = (batch.sampler_logprobs_BT, batch.reference_logprobs_BT, batch.proximal_logprobs_BT)
    for name, tensor in zip(("sampler's", "reference's", "proximal policy's"), tokens, strict=True):
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(f"the {name} log-probs are {list(tensor.shape)} but the mask is {list(mask.shape)}")
    per_row = (("rewards", batch.rewards_B), ("groups", batch.group_B), ("overlong marks", batch.overlong_B))
    for name, tensor in (*per_row, ("staleness", batch.staleness_B)):
        if tensor is not None and tensor.shape != (rows,):
            raise ValueError(f"the {name} are {list(tensor.shape)} but the batch has {rows} rows")
    if batch.group_B.is_floating_point():
        raise ValueError("group numbers must be integers")
    parts = batch.reward_parts_BK
    if parts is not None and (parts.ndim != 2 or parts.shape[0] != rows or parts.shape[1] == 0):
        raise ValueError(f"reward parts must be [{rows}, K], not {list(parts.shape)}")
    numbers, counts = torch.unique(batch.group_B, return_counts=True)
    if bool((counts < 2).any()):
        lonely = int(numbers[counts < 2][0])
        raise ValueError(
            f"group {lonely} has one row: with group size 1 the advantage is undefined (a reward minus its own mean)"
        )

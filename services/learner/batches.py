"""Scored groups to tensors, and tensors to micro-batches.

    groups ─► rows prompt+completion, right-padded ─► Batch (what a loss reads) ─► micro-batches by token budget

Column t of every [B, T] tensor is the prediction of token t + 1: T is the longest row minus one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.learner.losses.batch import Batch
from services.wire.types import FinishReason, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainGroup:
    """A group with what the step reports about it. `staleness` is in versions, `age_s` since it arrived."""

    group: ScoredGroup
    sampler_id: str
    staleness: int
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """All rows of one optimizer step, on the CPU. Padding stands at the end and is 0."""

    token_ids_BL: Tensor
    """int64: prompt and completion; L = T + 1."""
    length_B: Tensor
    """int64: tokens of each row."""
    loss_inputs: Batch

    def __len__(self) -> int:
        return self.token_ids_BL.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some rows, cut to the longest of them. `index_b` are their places in the batch."""

    index_b: Tensor
    token_ids_bl: Tensor
    attention_bl: Tensor

    @property
    def columns(self) -> int:
        """Columns of its [b, t] tensors."""
        return self.token_ids_bl.shape[1] - 1


def build_batch(groups: Sequence[TrainGroup]) -> RowBatch:
    """Rows in the order of the groups; the rows of one group share its number in `group_B`."""
    rows = [(number, item, completion) for number, item in enumerate(groups) for completion in item.group.completions]
    prompt_B = torch.tensor([len(item.group.prompt_token_ids) for _, item, _ in rows])
    length_B = prompt_B + torch.tensor([len(completion.token_ids) for _, _, completion in rows])
    place_L = torch.arange(int(length_B.max()))
    token_ids_BL = torch.zeros((len(rows), len(place_L)), dtype=torch.int64)
    # A mask of each row's own places, filled row by row from one flat list: a tensor per row takes most of a step.
    token_ids_BL[place_L < length_B[:, None]] = torch.tensor(
        [token for _, item, completion in rows for token in (*item.group.prompt_token_ids, *completion.token_ids)]
    )
    mask_BT = (place_L[:-1] >= prompt_B[:, None] - 1) & (place_L[:-1] < length_B[:, None] - 1)
    sampler_logprobs_BT = torch.zeros(mask_BT.shape, dtype=torch.float32)
    sampler_logprobs_BT[mask_BT] = torch.tensor(
        [logprob for _, _, completion in rows for logprob in completion.sampler_logprobs], dtype=torch.float32
    )
    return RowBatch(
        token_ids_BL=token_ids_BL,
        length_B=length_B,
        loss_inputs=Batch(
            sampler_logprobs_BT=sampler_logprobs_BT,
            mask_BT=mask_BT,
            rewards_B=torch.tensor([completion.reward for _, _, completion in rows], dtype=torch.float64),
            group_B=torch.tensor([number for number, _, _ in rows]),
            overlong_B=torch.tensor([completion.finish_reason is FinishReason.LENGTH for _, _, completion in rows]),
            staleness_B=torch.tensor([item.staleness for _, item, _ in rows], dtype=torch.float64),
        ),
    )


def micro_batches(batch: RowBatch, max_tokens: int, row_r: Tensor | None = None) -> Iterator[MicroBatch]:
    """Cuts of at most `max_tokens` tokens with padding (one row at least), longest rows first; of `row_r` only.

    Sorting by length wastes little padding; the first pass is the largest, so that running out of memory shows at once.
    """
    row_r = torch.arange(len(batch)) if row_r is None else row_r
    order = row_r[torch.argsort(batch.length_B[row_r], descending=True, stable=True)]
    start = 0
    while start < len(order):
        longest = int(batch.length_B[order[start]])
        index_b = order[start : start + max(1, max_tokens // longest)]
        columns = torch.arange(longest)
        yield MicroBatch(
            index_b=index_b,
            token_ids_bl=batch.token_ids_BL[index_b, :longest],
            attention_bl=(columns[None, :] < batch.length_B[index_b, None]).long(),
        )
        start += len(index_b)

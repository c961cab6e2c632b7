"""The frozen policy that `loss.kl_target = "reference"` pulls to: the one that the run began with.

    batch ─► forward passes of the frozen model, no gradient ─► reference log-probs of the batch

What it costs: a second model on the trainer's device, and one more forward pass per row.
"""

from dataclasses import replace

import torch

from services.learner.batches import RowBatch, micro_batches
from services.learner.forward import Forward
from services.learner.policy import Policy


class Reference:
    """`policy` is a model of its own, that nobody trains."""

    def __init__(self, policy: Policy, *, temperature: float, autocast: bool, micro_batch_tokens: int) -> None:
        policy.model.requires_grad_(False)
        self._forward = Forward(policy, temperature, autocast)
        self._micro_batch_tokens = micro_batch_tokens

    @torch.no_grad()
    def filled(self, batch: RowBatch) -> RowBatch:
        """The batch with `reference_logprobs_BT`, at the trainer's temperature; 0 outside the completions."""
        mask_BT = batch.loss_inputs.mask_BT
        logprobs_BT = torch.zeros(mask_BT.shape)
        for micro in micro_batches(batch, self._micro_batch_tokens):
            mask_bt = mask_BT[micro.index_b, : micro.columns]
            found_bt = self._forward(micro, mask_bt).logprobs_BT.cpu().float()
            logprobs_BT[micro.index_b, : micro.columns] = torch.where(mask_bt, found_bt, 0.0)
        return replace(batch, loss_inputs=replace(batch.loss_inputs, reference_logprobs_BT=logprobs_BT))

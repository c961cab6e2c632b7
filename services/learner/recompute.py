"""The trainer's own log-probs of what samplers drew, under the versions that drew it (batch.recompute_logprobs).

    published weights (bf16 bits, host memory) ─► second model, one version after another ─► forward passes, no gradient

The loss then compares log-probs of one implementation, and an engine's rounding (bf16 kernels, quantisation) is out of
the ratio p/q. What it costs: host memory for max_staleness + 1 versions, a second model on the trainer's device, and
one more forward pass per row and version.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from services.learner.batches import RowBatch, TrainGroup, micro_batches
from services.learner.forward import Forward
from services.learner.policy import Policy
from services.wire.delta import Weights
from services.wire.torch_bits import to_torch

_UNKNOWN = -1


class Recomputer:
    """`versions`: how many of the newest are held. `hold` may be called while `recomputed` goes on in its thread."""

    def __init__(
        self, policy: Policy, *, temperature: float, autocast: bool, versions: int, micro_batch_tokens: int
    ) -> None:
        self._policy = replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False))
        self._forward = Forward(self._policy, temperature, autocast)
        self._versions = versions
        self._micro_batch_tokens = micro_batch_tokens
        self._held: dict[int, Weights] = {}

    def hold(self, version: int, weights: Weights) -> None:
        """Keeps a published version; the oldest is forgotten. `weights` must not change afterwards."""
        newest = sorted({*self._held, version})[-self._versions :]
        self._held = {number: weights if number == version else self._held[number] for number in newest}

    def recomputed(self, groups: Sequence[TrainGroup], batch: RowBatch) -> tuple[RowBatch, float]:
        """The batch with recomputed sampler log-probs, and the share of tokens that have them.

        A token whose version is not held (before a restart of the learner) keeps the sampler's own number.
        """
        inputs = batch.loss_inputs
        version_BT = _versions(groups, inputs.mask_BT)
        logprobs_BT = inputs.sampler_logprobs_BT.clone()
        done_BT = torch.zeros_like(inputs.mask_BT)
        held = self._held
        for version in sorted(held.keys() & set(version_BT.unique().tolist())):
            of_version_BT = version_BT == version
            self._load(held[version])
            self._fill(batch, of_version_BT, logprobs_BT)
            done_BT |= of_version_BT
        share = float(done_BT.sum()) / max(1, int(inputs.mask_BT.sum()))
        return replace(batch, loss_inputs=replace(inputs, sampler_logprobs_BT=logprobs_BT)), share

    @torch.no_grad()
    def _load(self, weights: Weights) -> None:
        incoming = to_torch(weights)
        for name, parameter in self._policy.parameters().items():
            parameter.copy_(incoming[name])

    @torch.no_grad()
    def _fill(self, batch: RowBatch, wanted_BT: Tensor, logprobs_BT: Tensor) -> None:
        for micro in micro_batches(batch, self._micro_batch_tokens, wanted_BT.any(1).nonzero().squeeze(1)):
            wanted_bt = wanted_BT[micro.index_b, : micro.columns]
            ours_bt = self._forward(micro, wanted_bt).logprobs_BT.cpu().float()
            before_bt = logprobs_BT[micro.index_b, : micro.columns]
            logprobs_BT[micro.index_b, : micro.columns] = torch.where(wanted_bt, ours_bt, before_bt)


def _versions(groups: Sequence[TrainGroup], mask_BT: Tensor) -> Tensor:
    """The version that drew each token, int64 [B, T]; _UNKNOWN outside of the completions."""
    drawn: list[int] = []
    for item in groups:
        for completion in item.group.completions:
            start = 0
            for span in completion.version_spans:
                drawn.extend([span.policy_version] * (span.end - start))
                start = span.end
            drawn.extend([item.group.policy_version] * (len(completion.token_ids) - start))
    version_BT = torch.full(mask_BT.shape, _UNKNOWN, dtype=torch.int64)
    version_BT[mask_BT] = torch.tensor(drawn)
    return version_BT

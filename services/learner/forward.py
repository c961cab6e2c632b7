"""The learner's log-probs of given tokens, for any causal language model.

body ─► hidden states ─► head in chunks        where the head is a plain matrix (most models)
model ─► logits                                where it is not: bias, soft caps, scaled logits
"""

from typing import cast

import torch
from torch import Tensor

from services.learner.batches import MicroBatch
from services.learner.logprobs import TokenLogprobs, logprobs_of_logits, token_logprobs
from services.learner.policy import Policy

_PROBE_TOKENS = 4
_SAME = 1e-4
"""Largest difference of logits, in units of the largest logit, that rounding explains."""
_LARGE = 100.0
"""The probe's largest logit: a cap changes nothing in the small ones of a model that has learnt nothing yet."""


class Forward:
    """Decides once, by trying, which way gives the model's own logits."""

    def __init__(self, policy: Policy, temperature: float, autocast: bool) -> None:
        self._policy = policy
        self._temperature = temperature
        self._autocast = autocast
        self._head_VH = self._plain_head()

    @property
    def in_chunks(self) -> bool:
        """Whether logits are computed in chunks: memory does not grow with the vocabulary."""
        return self._head_VH is not None

    def __call__(self, micro: MicroBatch, mask_bt: Tensor) -> TokenLogprobs:
        """Log-probs and entropy, float32 [b, t], of the tokens that the columns predict; 0 or anything outside the
        mask. The temperature divides the logits."""
        device = self._policy.device
        token_ids_bl, mask_bt = micro.token_ids_bl.to(device), mask_bt.to(device)
        targets_bt = token_ids_bl[:, 1:]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._autocast):
            if self._head_VH is None:
                output = self._policy.model(input_ids=token_ids_bl, attention_mask=micro.attention_bl.to(device))
                return logprobs_of_logits(cast(Tensor, output.logits)[:, :-1], targets_bt, self._temperature)
            hidden_BTH = self._hidden(token_ids_bl, micro.attention_bl.to(device))[:, :-1]
            return token_logprobs(
                hidden_BTH,
                self._head_VH,
                targets_bt,
                self._temperature,
                with_entropy=True,
                mask_BT=mask_bt,
                matmul_dtype=torch.bfloat16 if self._autocast else None,
            )

    def _hidden(self, token_ids_bl: Tensor, attention_bl: Tensor) -> Tensor:
        body = self._policy.model.base_model
        return cast(Tensor, body(input_ids=token_ids_bl, attention_mask=attention_bl).last_hidden_state)

    @torch.no_grad()
    def _plain_head(self) -> Tensor | None:
        """The head's matrix, if hidden states times it are the model's logits."""
        model = self._policy.model
        head = cast("torch.nn.Module | None", model.get_output_embeddings())
        if head is None or model.base_model is model or not isinstance(head, torch.nn.Linear) or head.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] - a Linear without bias holds None
            return None
        ids = torch.arange(_PROBE_TOKENS, device=self._policy.device)[None] % self._policy.vocab_size
        attention = torch.ones_like(ids)
        ours = (self._hidden(ids, attention) @ head.weight.t()).float()
        factor = _LARGE / max(float(ours.abs().max()), torch.finfo(torch.float32).tiny)
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor,))
        try:
            logits = cast(Tensor, model(input_ids=ids, attention_mask=attention).logits).float()
        finally:
            hook.remove()
        ours *= factor
        if ours.shape != logits.shape:
            return None
        alike = float((ours - logits).abs().max()) <= _SAME * float(logits.abs().max())  # not where either is NaN
        return head.weight if alike else None

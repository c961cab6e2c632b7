"""Log-probs and entropy of given tokens, without the [B, T, V] logits ever standing in memory.

    hidden [N, H] ─ chunk of rows ─► logits [c, V] float32 ─► log-prob, entropy of each row ─► logits are freed
                                     computed again, chunk by chunk, in the backward pass

At Qwen3's V = 151,936 one row of logits is 0.6 MB in float32: 32k tokens are 20 GB, a chunk of 512 is 0.3 GB.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK_TOKENS = 512


class TokenLogprobs(NamedTuple):
    """Unpacks as (log-probs, entropy). Nats; float32, or float64 where the inputs are."""

    logprobs_BT: Tensor
    entropy_BT: Tensor | None


def token_logprobs(
    hidden_BTH: Tensor,
    head_VH: Tensor,
    targets_BT: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    with_entropy: bool = False,
    *,
    mask_BT: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> TokenLogprobs:
    """log softmax(hidden · headᵀ / temperature) at `targets_BT`, and the entropy of that distribution.

    Gradients flow to hidden states and head, from both outputs. Autocast is switched off inside: sums, exponentials
    and results are float32. `matmul_dtype` is the type that the two factors are cast to (bfloat16 for tensor cores:
    what a sampler computes with); products are accumulated in float32 and never rounded to it. Unset: the wider of
    the two inputs'. Only tokens in `mask_BT` are computed where it is given, the rest are 0. Raises ValueError where
    shapes, temperature or chunk make no sense; token ids must lie in [0, V).
    """
    if hidden_BTH.ndim != 3 or head_VH.ndim != 2 or hidden_BTH.shape[2] != head_VH.shape[1]:
        raise ValueError(f"hidden states {list(hidden_BTH.shape)} do not fit the head {list(head_VH.shape)}")
    if targets_BT.shape != hidden_BTH.shape[:2]:
        raise ValueError(f"targets {list(targets_BT.shape)} do not fit hidden states {list(hidden_BTH.shape)}")
    if not temperature > 0.0 or chunk_tokens < 1:
        raise ValueError(f"temperature {temperature} and chunk_tokens {chunk_tokens} must be above 0")
    wanted = torch.promote_types(hidden_BTH.dtype, head_VH.dtype) if matmul_dtype is None else matmul_dtype
    if mask_BT is None:
        hidden_NH, targets_N = hidden_BTH.flatten(0, 1), targets_BT.flatten()
    else:
        hidden_NH, targets_N = hidden_BTH[mask_BT], targets_BT[mask_BT]
    outputs = cast(
        "tuple[Tensor, Tensor]",
        _Chunked.apply(hidden_NH, head_VH, targets_N, temperature, chunk_tokens, with_entropy, wanted),
    )
    logprobs_BT, entropy_BT = (_spread(values_N, targets_BT, mask_BT) for values_N in outputs)
    return TokenLogprobs(logprobs_BT=logprobs_BT, entropy_BT=entropy_BT if with_entropy else None)


def logprobs_of_logits(logits_BTV: Tensor, targets_BT: Tensor, temperature: float = 1.0) -> TokenLogprobs:
    """The same from logits [B, T, V]: the plain computation, for small vocabularies, odd heads and tests."""
    with torch.autocast(logits_BTV.device.type, enabled=False):
        wide = logits_BTV if logits_BTV.dtype is torch.float64 else logits_BTV.float()
        all_BTV = torch.log_softmax(wide / temperature, dim=-1)
        logprobs_BT = all_BTV.gather(-1, targets_BT[..., None]).squeeze(-1)
        return TokenLogprobs(logprobs_BT=logprobs_BT, entropy_BT=-(all_BTV.exp() * all_BTV).sum(-1))


def _spread(values_N: Tensor, targets_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    if mask_BT is None:
        return values_N.reshape(targets_BT.shape)
    return values_N.new_zeros(targets_BT.shape).masked_scatter(mask_BT, values_N)


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right with products summed in float32 or wider, and not rounded to the factors' type.

    `out` is memory that may be used again: fresh pages for every chunk cost a CPU more than the product.
    """
    if left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float(), out=out)


def _buffers(chunk_tokens: int, hidden_NH: Tensor, head_VH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two [c, V] buffers: all that a pass needs beyond its results."""
    shape = (min(chunk_tokens, hidden_NH.shape[0]), head_VH.shape[0])
    return hidden_NH.new_empty(shape, dtype=dtype), hidden_NH.new_empty(shape, dtype=dtype)


class _Saved(FunctionCtx):
    """What forward leaves for backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    temperature: float
    chunk_tokens: int
    matmul_dtype: torch.dtype


class _Chunked(torch.autograd.Function):
    """z = hidden · headᵀ / temperature; log-prob = z_target - lse; entropy H = lse - Σ softmax(z) z."""

    @staticmethod
    def forward(
        ctx: _Saved,
        hidden_NH: Tensor,
        head_VH: Tensor,
        targets_N: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
        matmul_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if matmul_dtype is torch.float64 else torch.float32
        rows = hidden_NH.shape[0]
        logprobs_N, lse_N, entropy_N = (hidden_NH.new_zeros(rows, dtype=wide) for _ in range(3))
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head_HV = head_VH.to(matmul_dtype).t()
            first, second = _buffers(chunk_tokens, hidden_NH, head_VH, wide)
            for start in range(0, rows, chunk_tokens):
                part = slice(start, start + chunk_tokens)
                hidden = hidden_NH[part].to(matmul_dtype)
                z_CV = _product(hidden, head_HV, first[: len(hidden)]).div_(temperature)
                top_C1 = z_CV.amax(1, keepdim=True)
                z_CV.sub_(top_C1)
                e_CV = torch.exp(z_CV, out=second[: len(hidden)])
                total_C = e_CV.sum(1)
                lse_N[part] = top_C1.squeeze(1) + total_C.log()
                logprobs_N[part] = z_CV.gather(1, targets_N[part, None]).squeeze(1) - total_C.log()
                if with_entropy:
                    entropy_N[part] = total_C.log() - e_CV.mul_(z_CV).sum(1) / total_C
        ctx.save_for_backward(hidden_NH, head_VH, targets_N, lse_N, entropy_N)
        ctx.temperature, ctx.chunk_tokens, ctx.matmul_dtype = temperature, chunk_tokens, matmul_dtype
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _Saved, grad_logprobs_N: Tensor, grad_entropy_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        """d log-prob/dz = onehot - p and dH/dz = -p (log p + H), from logits computed again chunk by chunk."""
        hidden_NH, head_VH, targets_N, lse_N, entropy_N = ctx.saved_tensors
        to_hidden, to_head = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.empty_like(hidden_NH) if to_hidden else None
        grad_head_VH = torch.zeros_like(head_VH, dtype=lse_N.dtype) if to_head else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head = head_VH.to(ctx.matmul_dtype)
            first, second = _buffers(ctx.chunk_tokens, hidden_NH, head_VH, lse_N.dtype)
            for start in range(0, hidden_NH.shape[0], ctx.chunk_tokens):
                part = slice(start, start + ctx.chunk_tokens)
                hidden = hidden_NH[part].to(ctx.matmul_dtype)
                log_p_CV = _product(hidden, head.t(), first[: len(hidden)]).div_(ctx.temperature)
                log_p_CV = log_p_CV.sub_(lse_N[part, None])
                p_CV = torch.exp(log_p_CV, out=second[: len(hidden)])
                grad_C1 = grad_logprobs_N[part, None]
                # In place in the two buffers: -p (g + g_H (log p + H)), then + g at the target.
                slope_CV = log_p_CV.add_(entropy_N[part, None]).mul_(grad_entropy_N[part, None]).add_(grad_C1)
                slope_CV = slope_CV.mul_(p_CV).neg_().scatter_add_(1, targets_N[part, None], grad_C1)
                slope = slope_CV.div_(ctx.temperature).to(ctx.matmul_dtype)
                if grad_hidden_NH is not None:
                    grad_hidden_NH[part] = _product(slope, head).to(hidden_NH.dtype)
                if grad_head_VH is not None:
                    grad_head_VH += _product(slope.t(), hidden)
        grad_head = None if grad_head_VH is None else grad_head_VH.to(head_VH.dtype)
        return grad_hidden_NH, grad_head, None, None, None, None, None

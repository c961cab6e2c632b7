"""Chunked log-probs and entropy against the plain computation, in value and gradient."""

import pytest
import torch
from torch import Tensor

from services.learner.logprobs import logprobs_of_logits, token_logprobs

B, T, H, V = 3, 5, 8, 37


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(B, T, H, dtype=dtype, generator=generator).requires_grad_()
    head_VH = torch.randn(V, H, dtype=dtype, generator=generator).requires_grad_()
    return hidden_BTH, head_VH, torch.randint(0, V, (B, T), generator=generator)


def backward(logprobs_BT: Tensor, entropy_BT: Tensor | None, *leaves: Tensor) -> list[Tensor]:
    weights_BT = torch.linspace(-1.0, 2.0, B * T, dtype=logprobs_BT.dtype).reshape(B, T)
    total = (weights_BT * logprobs_BT).sum()
    if entropy_BT is not None:
        total = total + (weights_BT.flip(0) * entropy_BT).sum()
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("chunk", [1, 4, 15, 512])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_chunks_give_the_plain_values_and_gradients(chunk: int, temperature: float) -> None:
    hidden_BTH, head_VH, targets_BT = inputs()
    plain = logprobs_of_logits(hidden_BTH @ head_VH.t(), targets_BT, temperature)
    chunked = token_logprobs(hidden_BTH, head_VH, targets_BT, temperature, chunk, with_entropy=True)
    assert chunked.entropy_BT is not None
    assert plain.entropy_BT is not None
    assert torch.allclose(chunked.logprobs_BT, plain.logprobs_BT, rtol=1e-12, atol=1e-12)
    assert torch.allclose(chunked.entropy_BT, plain.entropy_BT, rtol=1e-12, atol=1e-12)
    wanted = backward(*plain, hidden_BTH, head_VH)
    for mine, theirs in zip(backward(*chunked, hidden_BTH, head_VH), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_without_entropy_the_gradient_is_that_of_the_log_probs_alone() -> None:
    hidden_BTH, head_VH, targets_BT = inputs()
    chunked = token_logprobs(hidden_BTH, head_VH, targets_BT, 0.7, 4)
    assert chunked.entropy_BT is None
    plain = logprobs_of_logits(hidden_BTH @ head_VH.t(), targets_BT, 0.7)
    wanted = backward(plain.logprobs_BT, None, hidden_BTH, head_VH)
    for mine, theirs in zip(backward(chunked.logprobs_BT, None, hidden_BTH, head_VH), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_only_masked_tokens_are_computed_and_only_they_have_a_gradient() -> None:
    hidden_BTH, head_VH, targets_BT = inputs()
    mask_BT = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    with torch.no_grad():
        hidden_BTH[~mask_BT] = torch.nan
    part = token_logprobs(hidden_BTH, head_VH, targets_BT, 0.6, 2, with_entropy=True, mask_BT=mask_BT)
    plain = logprobs_of_logits(torch.where(mask_BT[..., None], hidden_BTH, 0.0) @ head_VH.t(), targets_BT, 0.6)
    assert torch.allclose(part.logprobs_BT, torch.where(mask_BT, plain.logprobs_BT, 0.0))
    (gradient_BTH,) = backward(part.logprobs_BT, part.entropy_BT, hidden_BTH)
    assert bool(torch.isfinite(gradient_BTH).all())
    assert torch.equal((gradient_BTH != 0).any(-1), mask_BT)


def test_autocast_leaves_float32_log_probs_alone() -> None:
    hidden_BTH, head_VH, targets_BT = inputs(torch.float32)
    outside = token_logprobs(hidden_BTH, head_VH, targets_BT, with_entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logprobs(hidden_BTH, head_VH, targets_BT, with_entropy=True)
        plain = logprobs_of_logits(hidden_BTH.bfloat16() @ head_VH.bfloat16().t(), targets_BT)
    assert inside.logprobs_BT.dtype is torch.float32
    assert torch.equal(inside.logprobs_BT, outside.logprobs_BT)
    gradients = zip(backward(*inside, hidden_BTH, head_VH), backward(*outside, hidden_BTH, head_VH), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in gradients)
    assert plain.logprobs_BT.dtype is torch.float32


def test_bfloat16_factors_are_multiplied_without_rounding_the_logits() -> None:
    hidden_BTH, head_VH, targets_BT = inputs(torch.float32)
    short = token_logprobs(hidden_BTH, head_VH, targets_BT, matmul_dtype=torch.bfloat16)
    exact = token_logprobs(hidden_BTH.bfloat16().float(), head_VH.bfloat16().float(), targets_BT)
    assert short.logprobs_BT.dtype is torch.float32
    assert torch.allclose(short.logprobs_BT, exact.logprobs_BT, rtol=1e-6, atol=1e-6)
    mine = backward(short.logprobs_BT, None, hidden_BTH, head_VH)
    assert [gradient.dtype for gradient in mine] == [torch.float32, torch.float32]
    for rough, fine in zip(mine, backward(exact.logprobs_BT, None, hidden_BTH, head_VH), strict=True):
        assert torch.allclose(rough, fine, rtol=0.02, atol=0.02 * float(fine.abs().max()))


def test_logits_of_any_size_keep_log_probs_at_or_below_zero_and_finite() -> None:
    hidden_BTH, head_VH, targets_BT = inputs(torch.float32)
    result = token_logprobs(hidden_BTH * 1000.0, head_VH, targets_BT, 0.01, with_entropy=True)
    assert result.entropy_BT is not None
    assert bool(torch.isfinite(result.logprobs_BT).all())
    assert bool((result.logprobs_BT <= 0.0).all())
    assert bool(torch.isfinite(result.entropy_BT).all())


def test_nothing_to_compute_gives_nothing() -> None:
    hidden_BTH, head_VH, _ = inputs()
    empty = token_logprobs(hidden_BTH[:, :0], head_VH, torch.zeros(B, 0, dtype=torch.int64), with_entropy=True)
    assert empty.logprobs_BT.shape == (B, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head_VH": torch.zeros(V, H + 1)}, "do not fit the head"),
        ({"targets_BT": torch.zeros(B, T + 1, dtype=torch.int64)}, "do not fit hidden states"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"chunk_tokens": 0}, "must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, object], sentence: str) -> None:
    hidden_BTH, head_VH, targets_BT = inputs()
    arguments = {"hidden_BTH": hidden_BTH, "head_VH": head_VH, "targets_BT": targets_BT, **change}
    with pytest.raises(ValueError, match=sentence):
        token_logprobs(**arguments)  # pyright: ignore

"""Drawing one token per row. Axes: B rows of the running batch, V vocabulary."""

import torch
from torch import Tensor

from services.wire.types import SamplingSettings

NEGATIVE_INFINITY = float("-inf")


def draw(
    logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor | None, top_k_B: Tensor | None, uniform_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids (int64, B) and the log-probs (float32, B) under the distribution that each was drawn from.

    logits_BV: float32. temperature_B: 0 stands for greedy, whose log-prob is taken at temperature 1 and without
    truncation. top_p_B and top_k_B: None when no row truncates; else 1 and 0 mean off. uniform_B in [0, 1): one number
    per row, so that a row's token depends on its own seed and logits only. Inverse transform sampling: one number
    replaces the V exponentials of the Gumbel trick.
    """
    greedy_B = temperature_B == 0
    scaled_BV = logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    if top_k_B is not None:
        scaled_BV = _keep_top_k(scaled_BV, torch.where(greedy_B, 0, top_k_B))
    if top_p_B is not None:
        scaled_BV = _keep_top_p(scaled_BV, torch.where(greedy_B, 1.0, top_p_B))
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    cumulative_BV = logprobs_BV.exp().cumsum(dim=-1)
    total_B = cumulative_BV[:, -1]
    # Below the total by one rounding step at least: the search then never runs past the last token of probability > 0.
    threshold_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    # Logits of NaN find nothing: the last token then, whose log-prob is NaN. An index beyond it breaks a GPU for good.
    last = logits_BV.shape[1] - 1
    token_B = torch.searchsorted(cumulative_BV, threshold_B[:, None], right=True)[:, 0].clamp(max=last)
    token_B = torch.where(greedy_B, logits_BV.argmax(dim=-1), token_B)
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]


def _keep_top_k(scaled_BV: Tensor, top_k_B: Tensor) -> Tensor:
    """Masks what is below the k-th largest value; ties with it stay, so that the outcome has no hidden order."""
    vocabulary = scaled_BV.shape[1]
    limit_B = torch.where(top_k_B == 0, vocabulary, top_k_B).clamp(max=vocabulary)
    largest_BK = scaled_BV.topk(int(limit_B.max()), dim=-1).values
    smallest_kept_B = largest_BK.gather(1, limit_B[:, None] - 1)
    return scaled_BV.masked_fill(scaled_BV < smallest_kept_B, NEGATIVE_INFINITY)


def _keep_top_p(scaled_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Keeps the shortest run of most likely tokens whose probability reaches top_p; the first always stays."""
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    probability_BV = sorted_BV.softmax(dim=-1)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    dropped_BV = (before_BV >= top_p_B[:, None]) & (top_p_B[:, None] < 1)
    dropped_BV[:, 0] = False
    return scaled_BV.masked_fill(torch.zeros_like(dropped_BV).scatter(1, order_BV, dropped_BV), NEGATIVE_INFINITY)


def uniforms(settings: SamplingSettings, completions: int, seed: int) -> Tensor:
    """All random numbers of one request (float32, completions × max tokens), from its own generator on the CPU."""
    generator = torch.Generator().manual_seed(seed & (1 << 63) - 1)
    return torch.rand((completions, settings.max_completion_tokens), generator=generator)

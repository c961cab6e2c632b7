"""Drawing a token where the logits are at their limits."""

import math

import pytest
import torch

from services.sampler.sampling import draw


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-24])
def test_logits_of_nan_draw_a_token_of_the_vocabulary_and_spoil_no_other_row(uniform: float) -> None:
    logits = torch.tensor([[math.nan] * 4, [0.0, -math.inf, -math.inf, -math.inf]])
    tokens, logprobs = draw(logits, torch.ones(2), None, None, torch.full((2,), uniform))
    assert 0 <= int(tokens[0]) < 4
    assert math.isnan(float(logprobs[0]))
    assert (int(tokens[1]), float(logprobs[1])) == (0, 0.0)

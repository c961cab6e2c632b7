"""What is measured between an engine's log-probs and the trainer's."""

import math

import pytest
import torch

from services.learner.batches import build_batch
from services.learner.mismatch import by_sampler, row_gaps
from tests.support.train_groups import train_group


def test_mean_maximum_and_kl_are_over_the_tokens_of_the_completion_only() -> None:
    learner_bt = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, 0.0, 0.0]])
    sampler_bt = torch.tensor([[-1.5, -1.75, 0.0], [-0.5, -7.0, -7.0]])
    mask_bt = torch.tensor([[True, True, False], [True, False, False]])
    gaps = row_gaps(learner_bt, sampler_bt, mask_bt)
    assert gaps.total_b.tolist() == [0.75, 0.0]
    assert gaps.largest_b.tolist() == [0.5, 0.0]
    by_hand = (math.exp(0.5) - 1 - 0.5) + (math.exp(-0.25) - 1 + 0.25)
    assert gaps.kl_b.tolist() == pytest.approx([by_hand, 0.0])


def test_the_kl_is_that_of_the_two_distributions() -> None:
    """Over all tokens, weighted with the probability that the sampler draws them."""
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    terms = row_gaps(p.log()[:, None], q.log()[:, None], torch.ones((3, 1), dtype=torch.bool)).kl_b
    assert float((q * terms).sum()) == pytest.approx(float((q * (q / p).log()).sum()))


def test_a_broken_engine_shows_as_a_large_number_and_not_as_an_infinite_one() -> None:
    gaps = row_gaps(torch.tensor([[0.0]]), torch.tensor([[-1e4]]), torch.tensor([[True]]))
    assert math.isfinite(float(gaps.kl_b))
    assert float(gaps.largest_b) == 1e4


def test_samplers_are_told_apart_and_only_the_current_version_counts() -> None:
    groups = [train_group(0), train_group(1), train_group(2), train_group(3, staleness=1)]
    batch = build_batch(groups)
    inputs = batch.loss_inputs
    off_B = torch.where(inputs.group_B == 3, 100.0, inputs.group_B.double() + 1)
    learner_BT = inputs.sampler_logprobs_BT + off_B[:, None].float()
    half = len(batch) // 2
    parts = [
        (index_b, row_gaps(learner_BT[index_b], inputs.sampler_logprobs_BT[index_b], inputs.mask_BT[index_b]))
        for index_b in (torch.arange(half), torch.arange(half, len(batch)))
    ]
    length_B = inputs.mask_BT.sum(1)
    found = by_sampler(groups, inputs.group_B, length_B, parts)
    tokens = [int(length_B[inputs.group_B == number].sum()) for number in range(3)]
    assert set(found) == {"s0", "s1"}
    assert found["s0"].tokens == tokens[0] + tokens[2]
    assert found["s0"].mean == pytest.approx((tokens[0] * 1 + tokens[2] * 3) / (tokens[0] + tokens[2]), rel=1e-5)
    assert found["s0"].largest == pytest.approx(3, rel=1e-5)
    assert found["s1"].mean == pytest.approx(2, rel=1e-5)

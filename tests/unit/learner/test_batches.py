"""Groups become rows, and rows micro-batches, without losing or moving a token."""

import pytest
import torch

from services.learner.batches import build_batch, micro_batches
from tests.support.train_groups import train_group


def test_each_column_predicts_the_next_token_of_its_row() -> None:
    groups = [train_group(1), train_group(2)]
    batch = build_batch(groups)
    row = 0
    for number, item in enumerate(groups):
        for completion in item.group.completions:
            mask_T = batch.loss_inputs.mask_BT[row]
            assert batch.token_ids_BL[row, 1:][mask_T].tolist() == list(completion.token_ids)
            expected_T = torch.tensor(completion.sampler_logprobs)
            assert torch.equal(batch.loss_inputs.sampler_logprobs_BT[row][mask_T], expected_T)
            assert int(batch.loss_inputs.group_B[row]) == number
            row += 1
    assert row == len(batch)


@pytest.mark.parametrize("budget", [1, 9, 25, 64, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget: int) -> None:
    batch = build_batch([train_group(seed) for seed in range(6)])
    seen: list[int] = []
    for micro in micro_batches(batch, budget):
        rows, length = micro.token_ids_bl.shape
        assert rows == 1 or rows * length <= budget
        assert length == int(batch.length_B[micro.index_b].max())
        assert torch.equal(micro.attention_bl.sum(1), batch.length_B[micro.index_b])
        seen += micro.index_b.tolist()
    assert sorted(seen) == list(range(len(batch)))


def test_overlong_rows_and_staleness_are_marked() -> None:
    item = train_group(3, staleness=5)
    inputs = build_batch([item]).loss_inputs
    assert inputs.overlong_B is not None
    assert inputs.staleness_B is not None
    assert inputs.overlong_B.tolist() == [len(one.token_ids) >= 6 for one in item.group.completions]
    assert set(inputs.staleness_B.tolist()) == {5.0}

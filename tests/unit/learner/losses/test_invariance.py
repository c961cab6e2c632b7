"""Loss, gradient and metrics are those of the batch: however it is cut, ordered, padded or spread over ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.learner.losses.evaluate import loss_of
from services.learner.losses.metrics import finish_metrics
from services.learner.losses.prepare import prepare
from services.learner.losses.settings import LossName
from tests.unit.learner.losses.building import batch_of, cases, evaluate, learner_of, random_case, settings_of
from tests.unit.learner.losses.oracle import Case

NAMES = [name.value for name in LossName]
QUICK = settings(max_examples=20, deadline=None)


def in_pieces(case: Case, pieces: list[list[int]], extra_columns: int = 0) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics from one backward per piece of rows, each cut to its own longest row."""
    prepared = prepare(batch_of(case, extra_columns), settings_of(case))
    learner_BT = learner_of(case, extra_columns)
    loss, partials = 0.0, []
    for piece in pieces:
        index = torch.tensor(piece)
        tokens = max(int(prepared.mask_BT[index].sum(1).max()), 1)
        output = loss_of(prepared.rows(index, tokens), learner_BT[index][:, :tokens])
        output.loss.backward()
        loss += output.loss.item()
        partials.append(output.metrics)
    assert learner_BT.grad is not None
    return loss, learner_BT.grad, finish_metrics(partials)


def permuted(case: Case, order: list[int]) -> Case:
    pick = lambda rows: None if rows is None else [rows[i] for i in order]  # noqa: E731
    return Case(
        loss=case.loss,
        logp=[case.logp[i] for i in order],
        logq=[case.logq[i] for i in order],
        rewards=[case.rewards[i] for i in order],
        groups=[case.groups[i] for i in order],
        prox=pick(case.prox),
        ref=pick(case.ref),
        overlong=pick(case.overlong),
        staleness=pick(case.staleness),
        options=case.options,
    )


@QUICK
@given(st.data())
def test_the_cut_into_micro_batches_changes_nothing(data: st.DataObject) -> None:
    case = data.draw(cases(NAMES))
    rows = data.draw(st.permutations(range(len(case.logp))))
    size = data.draw(st.integers(1, len(rows)))
    whole, gradient_BT = evaluate(case)
    loss, pieces_BT, metrics = in_pieces(case, [rows[i : i + size] for i in range(0, len(rows), size)])
    assert loss == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(pieces_BT, gradient_BT, rtol=1e-9, atol=1e-14)
    assert metrics == pytest.approx(finish_metrics([whole.metrics]), rel=1e-6, abs=1e-9)


@QUICK
@given(st.data())
def test_the_order_of_rows_changes_nothing(data: st.DataObject) -> None:
    case = data.draw(cases(NAMES))
    order = data.draw(st.permutations(range(len(case.logp))))
    whole, gradient_BT = evaluate(case)
    other, other_BT = evaluate(permuted(case, order))
    assert other.loss.item() == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(other_BT, gradient_BT[torch.tensor(order)], rtol=1e-9, atol=1e-14)
    assert finish_metrics([other.metrics]) == pytest.approx(finish_metrics([whole.metrics]), rel=1e-6, abs=1e-9)


@QUICK
@given(cases(NAMES), st.integers(1, 9))
def test_padding_and_what_stands_in_it_change_nothing(case: Case, columns: int) -> None:
    whole, gradient_BT = evaluate(case)
    wide, wide_BT = evaluate(case, extra_columns=columns)
    assert wide.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12, abs=1e-15)
    assert torch.equal(wide_BT[:, gradient_BT.shape[1] :], torch.zeros(len(case.logp), columns, dtype=torch.float64))
    assert torch.allclose(wide_BT[:, : gradient_BT.shape[1]], gradient_BT, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_ranks_changes_nothing(name: str, ranks: int) -> None:
    case = random_case(name, 21, prompts=3, size=4, kl_beta=0.01, aggregation="delta_l")
    rows = list(range(len(case.logp)))
    whole, gradient_BT = evaluate(case)
    loss, sum_BT, _ = in_pieces(case, [rows[rank::ranks] for rank in range(ranks)])
    assert loss == pytest.approx(whole.loss.item(), rel=1e-9)
    assert torch.allclose(sum_BT, gradient_BT, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_does_not_read_its_neighbours_but_through_the_normaliser(name: str) -> None:
    case = random_case(name, 22, prompts=2, aggregation="seq_mean", advantage="mean")
    _, gradient_BT = evaluate(case)
    kept = [i for i, group in enumerate(case.groups) if group == 0]
    _, alone_BT = evaluate(permuted(case, kept))
    width = alone_BT.shape[1]
    assert torch.allclose(alone_BT * 0.5, gradient_BT[torch.tensor(kept)][:, :width], rtol=1e-9, atol=1e-14)


def test_nan_in_the_learners_row_silences_that_row_alone() -> None:
    case = random_case("gepo", 23)
    whole, gradient_BT = evaluate(case)
    case.logp[3][0] = math.nan
    output, broken_BT = evaluate(case)
    assert torch.isfinite(output.loss)
    assert torch.equal(broken_BT[3], torch.zeros_like(broken_BT[3]))
    others = [i for i in range(len(case.logp)) if i != 3]
    assert torch.equal(broken_BT[others], gradient_BT[others])
    assert finish_metrics([output.metrics])["excluded_learner_nonfinite"] == 1.0
    assert finish_metrics([whole.metrics])["excluded_learner_nonfinite"] == 0.0


def test_a_cut_that_would_lose_tokens_is_refused() -> None:
    prepared = prepare(batch_of(random_case("gepo", 24)), settings_of(random_case("gepo", 24)))
    with pytest.raises(ValueError, match="tokens beyond column 1"):
        prepared.rows(torch.arange(len(prepared)), tokens=1)

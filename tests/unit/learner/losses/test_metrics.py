"""The metrics of a step, by their definitions."""

import math

import pytest
import torch

from services.learner.losses.evaluate import loss_of
from services.learner.losses.metrics import finish_metrics, weight_statistics
from services.learner.losses.prepare import prepare
from tests.unit.learner.losses.building import batch_of, learner_of, settings_of
from tests.unit.learner.losses.oracle import Case


def one_group(loss: str = "gepo", **options: object) -> Case:
    return Case(
        loss=loss,
        logp=[[-0.31], [-0.42], [-0.28], [-0.55]],
        logq=[[-0.30], [-0.45], [-0.33], [-0.50]],
        rewards=[1.0, 0.0, 1.0, 0.0],
        groups=[0] * 4,
        options=dict(options),
    )


def metrics_of(case: Case, entropy: float | None = None) -> dict[str, float]:
    learner_BT = learner_of(case)
    entropy_BT = None if entropy is None else torch.full_like(learner_BT, entropy)
    return finish_metrics([loss_of(prepare(batch_of(case), settings_of(case)), learner_BT, entropy_BT).metrics])


def test_weights_kl_and_bias_follow_their_definitions() -> None:
    case, metrics = one_group(), metrics_of(one_group(), entropy=1.5)
    q = [math.exp(row[0]) for row in case.logq]
    p = [math.exp(row[0]) for row in case.logp]
    e = sum(x * x for x in q) / sum(q)
    w = [x / e for x in p]
    ratio = [a / b for a, b in zip(p, q, strict=True)]
    d = [b[0] - a[0] for a, b in zip(case.logp, case.logq, strict=True)]
    a = [0.5, -0.5, 0.5, -0.5]
    assert metrics["weight_mean"] == pytest.approx(sum(w) / 4)
    assert metrics["weight_var"] == pytest.approx(sum((x - sum(w) / 4) ** 2 for x in w) / 4)
    assert metrics["weight_ess"] == pytest.approx(sum(w) ** 2 / sum(x * x for x in w))
    assert metrics["e_over_mean_q"] == pytest.approx(e / (sum(q) / 4))
    assert metrics["kl_k1"] == pytest.approx(-sum(d) / 4)
    assert metrics["kl_k2"] == pytest.approx(sum(x * x for x in d) / 8)
    assert metrics["kl_k3"] == pytest.approx(sum(math.exp(x) - x - 1 for x in d) / 4)
    expected = sum(r * x for r, x in zip(ratio, a, strict=True)) / sum(ratio)
    assert metrics["bias_estimate"] == pytest.approx(expected - sum(x * y for x, y in zip(w, a, strict=True)) / 4)
    assert metrics["entropy"] == 1.5
    assert metrics["advantage_mean"] == 0.0
    assert metrics["advantage_std"] == 0.5


def test_the_clip_share_counts_the_terms_that_the_clip_silences() -> None:
    on_policy = Case(
        loss="gepo",
        logp=[[-0.2], [-0.4], [-0.6], [-0.8]],
        logq=[[-0.2], [-0.4], [-0.6], [-0.8]],
        rewards=[1.0, 0.0, 1.0, 0.0],
        groups=[0] * 4,
    )
    assert metrics_of(on_policy)["clip_share"] == 0.5
    on_policy.options["clip_low"] = 0.9
    assert metrics_of(on_policy)["clip_share"] == 0.25


def test_token_losses_report_weights_of_tokens_and_sequence_losses_of_rows() -> None:
    case = Case(
        loss="grpo",
        logp=[[-1.0, -1.0], [-1.0]],
        logq=[[-1.0, -2.0], [-1.0]],
        rewards=[1.0, 0.0],
        groups=[4, 4],
    )
    metrics = metrics_of(case)
    assert metrics["weight_max"] == pytest.approx(math.e)
    assert metrics["weight_mean"] == pytest.approx((2.0 + math.e) / 3.0)
    assert metrics["tokens"] == 3.0
    case.loss = "gspo"
    assert metrics_of(case)["weight_max"] == pytest.approx(math.exp(0.5))


def test_quantiles_are_nearest_ranks_and_nothing_gives_zeros() -> None:
    weights = torch.arange(101, dtype=torch.float64).flip(0)
    statistics = weight_statistics(weights)
    assert (statistics["weight_p01"], statistics["weight_p50"], statistics["weight_p99"]) == (1.0, 50.0, 99.0)
    empty = weight_statistics(torch.zeros(0, dtype=torch.float64))
    assert set(empty) == set(statistics)
    assert set(empty.values()) == {0.0}


def test_metrics_of_no_micro_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="no micro-batch"):
        finish_metrics([])

"""Every loss, aggregation, advantage and KL against the scalar oracle, in value and gradient."""

import math

import pytest
import torch

from services.learner.losses.evaluate import loss_of, terms_of
from services.learner.losses.prepare import prepare
from services.learner.losses.settings import LossName
from services.learner.losses.table import LOSSES
from tests.unit.learner.losses import oracle
from tests.unit.learner.losses.building import batch_of, evaluate, learner_of, random_case, settings_of
from tests.unit.learner.losses.oracle import Case

NAMES = [name.value for name in LossName]
RELATIVE = 1e-9


def assert_matches_the_oracle(case: Case, relative: float = RELATIVE) -> None:
    expected = oracle.evaluate(case)
    output, gradient_BT = evaluate(case, extra_columns=2)
    assert output.loss.item() == pytest.approx(expected.loss, rel=relative, abs=1e-12)
    scale = max((abs(x) for row in expected.gradient for x in row), default=0.0)
    for row, wanted in zip(gradient_BT.tolist(), expected.gradient, strict=True):
        assert row[: len(wanted)] == pytest.approx(wanted, rel=relative, abs=1e-12 + 1e-12 * scale)
        assert row[len(wanted) :] == [0.0] * (len(row) - len(wanted))


def test_the_table_and_the_oracle_know_every_loss() -> None:
    assert set(LOSSES) == set(LossName)
    assert set(oracle.DEFAULTS) == set(NAMES)


@pytest.mark.parametrize("gap", [1e-4, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_equals_the_oracle_in_value_and_gradient(name: str, gap: float) -> None:
    for seed in range(2):
        assert_matches_the_oracle(random_case(name, seed, gap=gap))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_proximal_policy_the_current_one_stands_in(name: str) -> None:
    case = random_case(name, 11)
    case.prox = None
    assert_matches_the_oracle(case)


@pytest.mark.parametrize("aggregation", ["seq_mean", "token_mean", "dr_grpo", "delta_l"])
@pytest.mark.parametrize("name", ["grpo", "gepo", "topr", "gspo_token"])
def test_any_aggregation_goes_with_any_loss(name: str, aggregation: str) -> None:
    assert_matches_the_oracle(random_case(name, 5, aggregation=aggregation))
    assert_matches_the_oracle(random_case(name, 6, aggregation=aggregation, max_completion_tokens=50))


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0, 2.0])
def test_delta_l_weighs_sequences_by_a_power_of_their_length(alpha: float) -> None:
    assert_matches_the_oracle(random_case("grpo", 7, aggregation="delta_l", delta_l_alpha=alpha))


@pytest.mark.parametrize("rule", ["mean", "mean_std", "bnpo"])
@pytest.mark.parametrize("name", ["gepo", "grpo", "cispo"])
def test_any_advantage_goes_with_any_loss(name: str, rule: str) -> None:
    for seed in range(3):
        assert_matches_the_oracle(random_case(name, seed, prompts=6, advantage=rule))
        assert_matches_the_oracle(random_case(name, seed, prompts=6, advantage=rule, bnpo_shape="one_plus_third"))


@pytest.mark.parametrize("target", ["sampler", "reference"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", ["gepo", "grpo"])
def test_the_kl_regulariser_pulls_to_its_target(name: str, estimator: str, target: str) -> None:
    options = {"kl_beta": 0.05, "kl_estimator": estimator, "kl_target": target}
    assert_matches_the_oracle(random_case(name, 8, **options))


@pytest.mark.parametrize("name", ["gepo", "gspo", "gspo_token", "defensive", "gepo_plus", "topr", "seq_mask"])
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_a_sequence_weight_takes_the_mean_or_the_sum_of_its_log_probs(name: str, kind: str) -> None:
    assert_matches_the_oracle(random_case(name, 9, sequence_logprob=kind))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gepo", {"clip_low": 0.01, "clip_high": 0.02}),
        ("grpo", {"clip_low": 0.0, "clip_high": 0.0}),
        ("gmpo", {"clip_low": 0.1, "clip_high": 0.05}),
        ("cispo", {"clip_high": 4.0}),
        ("tis", {"weight_cap": 1.1}),
        ("icepop", {"weight_cap": 1.2, "weight_floor": 0.9}),
        ("seq_mask", {"weight_cap": 1.05}),
        ("defensive", {"eta": 0.5}),
        ("gepo_plus", {"gepo_plus_kl": 0.1}),
        ("grpo", {"advantage_epsilon": 0.5}),
    ],
)
def test_options_act_as_the_oracle_says(name: str, options: dict[str, float]) -> None:
    assert_matches_the_oracle(random_case(name, 10, **options))


@pytest.mark.parametrize("name", NAMES)
def test_overlong_rows_leave_the_loss_but_stay_in_the_baseline_and_in_the_expectation(name: str) -> None:
    case = random_case(name, 12)
    case.overlong = [i % 4 == 1 for i in range(len(case.logp))]
    assert_matches_the_oracle(case)
    case.options["mask_overlong"] = False
    assert_matches_the_oracle(case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["keep", "drop"])
def test_groups_of_equal_rewards_are_kept_or_dropped(name: str, rule: str) -> None:
    case = random_case(name, 13, zero_variance=rule)
    case.rewards = [0.1 if g == 0 else r for r, g in zip(case.rewards, case.groups, strict=True)]
    assert_matches_the_oracle(case)


@pytest.mark.parametrize("name", NAMES)
def test_broken_and_empty_rows_are_left_out(name: str) -> None:
    case = random_case(name, 14, prompts=4)
    for row, bad in ((0, math.nan), (1, -math.inf), (2, math.inf)):
        case.logq[row][0] = bad
    for rows in (case.logp, case.logq, case.prox, case.ref):
        assert rows is not None
        rows[3] = []
    assert_matches_the_oracle(case)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_probs_give_finite_losses_and_gradients(name: str) -> None:
    case = random_case(name, 15)
    case.prox = None
    case.logq[0] = [-5000.0] * len(case.logq[0])
    case.logp[0] = [-1e-6] * len(case.logq[0])
    case.logq[1] = [-1e-6] * len(case.logq[1])
    case.logp[1] = [-5000.0] * len(case.logq[1])
    case.logq[2] = [-5000.0] * len(case.logq[2])
    case.logp[2] = [-4999.0] * len(case.logq[2])
    assert_matches_the_oracle(case)
    output, gradient_BT = evaluate(case)
    assert torch.isfinite(output.loss)
    assert torch.isfinite(gradient_BT.float()).all()


# The samples of the design, to 1e-9.
SAMPLES = [
    (
        [-0.31, -0.42, -0.28, -0.55],
        [-0.30, -0.45, -0.33, -0.50],
        -0.3848689801499151,
        [1.0777429359, 0.9654789111, 1.1105650948, 0.8477826205],
    ),
    (
        [-0.2, -0.4, -0.6, -0.8],
        [-0.2, -0.4, -0.6, -0.8],
        None,
        [1.2548778077, 1.0274070525, 0.8411697498, 0.6886915427],
    ),
    (
        [-2003.0, -1996.0, -2001.0, -2010.0],
        [-2000.0, -2001.0, -2002.0, -2003.0],
        -2000.2951117596,
        [0.0668777977, 73.3404104820, 0.4941637987, 6.0984657587e-5],
    ),
]


@pytest.mark.parametrize(("s_p", "s_q", "log_e", "weights"), SAMPLES)
def test_gepo_reproduces_the_samples_of_the_design(
    s_p: list[float], s_q: list[float], log_e: float | None, weights: list[float]
) -> None:
    case = Case(loss="gepo", logp=[[x] for x in s_p], logq=[[x] for x in s_q], rewards=[1, 0, 1, 0], groups=[0] * 4)
    prepared = prepare(batch_of(case), settings_of(case))
    if log_e is not None:
        assert prepared.log_expected_q_B.tolist() == pytest.approx([log_e] * 4, rel=1e-9)
    terms = terms_of(prepared, learner_of(case))
    assert terms.weight.tolist() == pytest.approx(weights, rel=1e-9)
    assert_matches_the_oracle(case)


def test_gspo_token_equals_gspo_where_the_advantage_is_the_sequences() -> None:
    for seed in range(5):
        first, first_gradient = evaluate(random_case("gspo", seed, gap=1e-3))
        second, second_gradient = evaluate(random_case("gspo_token", seed, gap=1e-3))
        assert first.loss.item() == pytest.approx(second.loss.item(), rel=1e-12)
        assert torch.allclose(first_gradient, second_gradient, rtol=1e-12, atol=1e-15)


def test_float32_log_probs_give_the_float64_loss_to_float32_precision() -> None:
    for name in NAMES:
        case = random_case(name, 3)
        exact, _ = evaluate(case)
        learner_BT = learner_of(case).detach().float().requires_grad_()
        rough = loss_of(prepare(batch_of(case), settings_of(case)), learner_BT)
        rough.loss.backward()
        assert rough.loss.dtype is torch.float64
        assert rough.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4, abs=1e-5)
        assert learner_BT.grad is not None
        assert learner_BT.grad.dtype is torch.float32


def test_autocast_does_not_touch_the_ratio() -> None:
    for name in NAMES:
        case = random_case(name, 4)
        plain, plain_gradient = evaluate(case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast, cast_gradient = evaluate(case)
        assert cast.loss.item() == plain.loss.item()
        assert torch.equal(cast_gradient, plain_gradient)

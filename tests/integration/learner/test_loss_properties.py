"""What must hold whatever the numbers: bounds, shifts, permutations, clip regions."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.learner.losses.evaluate import terms_of
from services.learner.losses.groups import Groups, log_expected_q, log_mean_q
from services.learner.losses.prepare import prepare
from services.learner.losses.settings import LossName
from tests.unit.learner.losses.building import batch_of, cases, evaluate, learner_of, settings_of
from tests.unit.learner.losses.oracle import Case

NAMES = [name.value for name in LossName]
QUICK = settings(max_examples=25, deadline=None)
LOGS = st.lists(st.floats(-5000.0, -1e-6), min_size=2, max_size=8)
ONE_GROUP = {"rewards": [1.0, 0.0, 1.0, 0.0], "groups": [0, 0, 0, 0]}


def log_e_of(log_q: list[float]) -> float:
    values_B = torch.tensor(log_q, dtype=torch.float64)
    groups = Groups.of(torch.zeros(len(log_q), dtype=torch.int64))
    return float(log_expected_q(groups, values_B, torch.ones(len(log_q), dtype=torch.bool))[0])


@QUICK
@given(LOGS)
def test_the_expectation_lies_between_mean_and_maximum(log_q: list[float]) -> None:
    values_B = torch.tensor(log_q, dtype=torch.float64)
    groups = Groups.of(torch.zeros(len(log_q), dtype=torch.int64))
    mean = float(log_mean_q(groups, values_B, torch.ones(len(log_q), dtype=torch.bool))[0])
    slack = 1e-9 * (1.0 + abs(min(log_q)))
    assert min(log_q) - slack <= mean <= log_e_of(log_q) + slack
    assert log_e_of(log_q) <= max(log_q) + slack


@QUICK
@given(LOGS, st.floats(-1000.0, 0.0))
def test_a_shift_of_all_log_probs_shifts_the_expectation(log_q: list[float], shift: float) -> None:
    assert log_e_of([x + shift for x in log_q]) == pytest.approx(log_e_of(log_q) + shift, abs=1e-9)


@QUICK
@given(LOGS, st.randoms())
def test_the_expectation_does_not_know_the_order(log_q: list[float], rng: Random) -> None:
    mixed = list(log_q)
    rng.shuffle(mixed)
    assert log_e_of(mixed) == pytest.approx(log_e_of(log_q), abs=1e-9)


@QUICK
@given(st.lists(st.floats(-5.0, -1e-6), min_size=2, max_size=16))
def test_on_policy_the_gepo_weight_stays_under_its_bound(log_q: list[float]) -> None:
    bound = (1.0 + math.sqrt(len(log_q))) / 2.0
    assert all(math.exp(x - log_e_of(log_q)) <= bound * (1 + 1e-12) for x in log_q)


@QUICK
@given(cases(["defensive"]), st.sampled_from([0.005, 0.1, 0.9]))
def test_the_defensive_weight_is_bounded_by_one_over_eta(case: Case, eta: float) -> None:
    case.options["eta"] = eta
    weights_B = terms_of(prepare(batch_of(case), settings_of(case)), learner_of(case)).weight
    assert bool((weights_B <= (1.0 + 1e-12) / eta).all())


@QUICK
@given(cases(["gepo", "gspo", "grpo", "defensive"]))
def test_the_gradient_is_zero_exactly_where_the_clip_acts(case: Case) -> None:
    case.options.update(clip_low=0.2, clip_high=0.2, aggregation="seq_mean", advantage="mean")
    _, gradient_BT = evaluate(case)
    learner_BT = learner_of(case)
    prepared = prepare(batch_of(case), settings_of(case))
    terms = terms_of(prepared, learner_BT)
    weight = terms.weight if terms.weight.ndim == 2 else terms.weight[:, None]
    advantage_B1 = prepared.advantage_B[:, None]
    silent = ((advantage_B1 > 0) & (weight > 1.2)) | ((advantage_B1 < 0) & (weight < 0.8)) | (advantage_B1 == 0)
    silent_BT = silent.expand_as(gradient_BT)
    assert not bool(gradient_BT[silent_BT & prepared.mask_BT].any())
    speaking_BT = ~silent_BT & prepared.mask_BT & (weight > 1e-200) & (weight < math.exp(80.0))
    assert bool((gradient_BT[speaking_BT] != 0).all())


@QUICK
@given(cases(NAMES))
def test_the_gradient_is_finite_and_never_pushes_against_the_advantage(case: Case) -> None:
    output, gradient_BT = evaluate(case)
    assert bool(torch.isfinite(output.loss))
    assert bool(torch.isfinite(gradient_BT).all())
    advantage_B1 = prepare(batch_of(case), settings_of(case)).advantage_B[:, None]
    assert bool((gradient_BT * advantage_B1 <= 0.0).all())


def test_gmpo_clips_one_side_only() -> None:
    def slope(log_ratio: float, good: bool) -> float:
        case = Case(
            loss="gmpo",
            logp=[[-1.0 + log_ratio], [-1.0], [-1.0], [-1.0]],
            logq=[[-1.0]] * 4,
            rewards=[1.0, 0.0, 0.0, 0.0] if good else [0.0, 1.0, 1.0, 1.0],
            groups=[0] * 4,
        )
        return float(evaluate(case)[1][0, 0])

    assert slope(0.39, good=True) < 0.0
    assert slope(0.41, good=True) == 0.0
    assert slope(-0.9, good=True) < 0.0
    assert slope(-0.39, good=False) > 0.0
    assert slope(-0.41, good=False) == 0.0
    assert slope(0.9, good=False) > 0.0


def test_icepop_silences_tokens_on_both_sides_and_seq_mask_whole_rows() -> None:
    logq = [[-3.0, -3.0, -3.0], [-3.0], [-3.0], [-3.0]]
    logp = [[-3.0, -0.1, -5.0], [-3.0], [-3.0], [-3.0]]
    token = evaluate(Case(loss="icepop", logp=logp, logq=logq, **ONE_GROUP))[1][0]
    assert (token != 0.0).tolist() == [True, False, False]
    row = evaluate(Case(loss="seq_mask", logp=[[-3.0, -0.1, -2.0], *logp[1:]], logq=logq, **ONE_GROUP))[1]
    assert (row != 0.0).any(1).tolist() == [False, True, True, True]


def test_topr_does_not_weigh_positives_and_tapers_negatives() -> None:
    case = Case(loss="topr", logp=[[-9.0], [-9.0], [-1.0], [-1.0]], logq=[[-5.0], [-8.0], [-2.0], [-3.0]], **ONE_GROUP)
    gradient_B = evaluate(case)[1][:, 0].tolist()
    assert gradient_B == pytest.approx([-0.125, 0.125 * math.exp(-1.0), -0.125, 0.125])


def test_cispo_keeps_the_gradient_of_a_token_whose_weight_is_cut() -> None:
    case = Case(loss="cispo", logp=[[-0.1], [-1.0], [-1.0], [-1.0]], logq=[[-5.0], [-1.0], [-1.0], [-1.0]], **ONE_GROUP)
    gradient_B = evaluate(case)[1][:, 0].tolist()
    assert gradient_B[0] == pytest.approx(1.2 * gradient_B[2], rel=1e-12)


def weights_of(case: Case) -> torch.Tensor:
    return terms_of(prepare(batch_of(case), settings_of(case)), learner_of(case)).weight


@QUICK
@given(cases(["gepo_fresh"]), st.floats(0.0, 100.0), st.integers(0, 300))
def test_the_gepo_fresh_weight_is_never_above_that_of_gspo(case: Case, fresh: float, staleness: int) -> None:
    case.staleness, case.options = [staleness] * len(case.logp), {"fresh_versions": fresh}
    weight_B = weights_of(case)
    case.loss, case.options = "gspo", {}
    assert bool((weight_B <= weights_of(case) * (1 + 1e-9)).all())


@QUICK
@given(cases(["gepo_fresh"]))
def test_the_gepo_fresh_weight_of_a_stale_group_is_never_above_that_of_gepo(case: Case) -> None:
    case.staleness = [1000] * len(case.logp)
    weight_B = weights_of(case)
    case.loss = "gepo"
    assert bool((weight_B <= weights_of(case) * (1 + 1e-9)).all())


@QUICK
@given(cases(["gepo_fresh"]))
def test_the_gepo_fresh_weight_of_a_fresh_group_is_that_of_gspo(case: Case) -> None:
    case.staleness = [0] * len(case.logp)
    weight_B = weights_of(case)
    case.loss = "gspo"
    assert torch.equal(weight_B, weights_of(case))

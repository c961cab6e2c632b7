"""The theorems on small policies."""

import math

import numpy as np
import pytest

from services.lab.theory import BLENDS, Moments, bernoulli_grid, blend_findings, findings, gaussian_line


def test_the_group_weight_of_unit_gaussians_crosses_at_the_known_gap() -> None:
    line = gaussian_line()
    assert line.crossing == pytest.approx(0.398, abs=5e-4)
    # Closed forms: Var[p/q] = exp(gap²) - 1, E_q[p] = exp(-gap²/4) / (2 √π).
    assert line.moments["own"].variance == pytest.approx(np.exp(line.gaps**2) - 1, rel=1e-6, abs=1e-9)
    assert line.moments["group"].mean == pytest.approx(np.exp(-(line.gaps**2) / 4), rel=1e-9)


def test_the_theorems_hold_on_the_grid_and_the_group_weight_still_varies_more_on_a_third_of_it() -> None:
    found = findings(bernoulli_grid(60), gaussian_line())
    assert found["theorem_1_holds_share"] == 1.0
    assert found["theorem_2_holds_share"] == 1.0
    assert found["exact_group_variance_larger_share"] == pytest.approx(0.32, abs=0.02)
    assert isinstance(found["theorem_1_bound_is_positive_share"], float)
    assert found["theorem_1_bound_is_positive_share"] < 0.1


def test_a_group_of_any_size_has_chances_that_sum_to_one() -> None:
    grid = bernoulli_grid(5, group_size=1100)  # more ways to draw half of them than a float holds
    assert grid.drawn["own"].mean == pytest.approx(1.0)
    q = grid.chances[None, :]
    limit = (q**3 + (1 - q) ** 3) / (q**2 + (1 - q) ** 2)  # of E: E_q[q²] / E_q[q], and not E_q[q]
    assert grid.drawn["group"].mean == pytest.approx(grid.exact["group"].mean * (q**2 + (1 - q) ** 2) / limit, rel=0.01)


@pytest.mark.parametrize("size", [2, 8])
def test_the_larger_denominators_have_second_moments_below_both(size: int) -> None:
    found = findings(bernoulli_grid(40, size), gaussian_line(points=21))
    for kind in ("exact", "drawn"):
        for name in ("bound", "max"):
            assert found[f"{kind}_{name}_second_moment_never_above_either"] is True


@pytest.mark.parametrize("size", [2, 8])
def test_the_denominator_that_moves_obeys_proposition_4(size: int) -> None:
    grid, line = bernoulli_grid(40, size), gaussian_line(points=21)
    assert all(blend_findings(grid.blended, grid.log_gap).values())
    assert all(blend_findings(line.blended, line.log_gap).values())
    for moments, blended in ((grid.drawn, grid.blended), (line.moments, line.blended)):
        assert blended[0.0].second == pytest.approx(moments["own"].second)
        assert blended[1.0].second == pytest.approx(moments["max"].second)


def test_a_weight_that_breaks_proposition_4_is_found() -> None:
    grid = bernoulli_grid(10)
    wrong = {
        blend: Moments(mean=grid.blended[blend].mean - 1.0, second=grid.blended[1 - blend].second) for blend in BLENDS
    }
    assert not any(
        blend_findings(wrong, 0.0 * grid.log_gap)[key] for key in ("second_moment_falls", "bias_within_bound")
    )


def test_moments_are_those_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    grid = bernoulli_grid(10, 4)
    down, across = 2, 6
    p, q = float(grid.chances[down]), float(grid.chances[across])
    first = rng.random((200_000, 4)) < q
    q_j, p_j = np.where(first, q, 1 - q), np.where(first, p, 1 - p)
    e = (q_j**2).sum(1, keepdims=True) / q_j.sum(1, keepdims=True)
    denominators = {"own": q_j, "group": e, "bound": np.maximum(q_j, e), "max": q_j.max(1, keepdims=True)}
    for name, denominator in denominators.items():
        weight = p_j / denominator
        assert weight.mean() == pytest.approx(grid.drawn[name].mean[down, across], rel=0.01)
        assert (weight**2).mean() == pytest.approx(grid.drawn[name].second[down, across], rel=0.02)


def test_on_policy_the_ordinary_weight_is_one() -> None:
    grid = bernoulli_grid(10)
    assert np.diag(grid.exact["own"].variance) == pytest.approx(0.0, abs=1e-12)
    assert grid.kl[3, 3] == 0.0
    assert math.isclose(grid.exact["own"].mean[2, 7], 1.0)


def test_theorem_2_bounds_the_bias_on_two_outcomes_and_not_on_many() -> None:
    grid = bernoulli_grid(60)
    assert (np.abs(1 - grid.exact["group"].mean) <= grid.theorem_2_slack + grid.exact["group"].mean).all()
    p, q = np.full(100, 0.01), np.array([0.999, *[0.001 / 99] * 99])
    bound, mean = np.linalg.norm(p) / np.linalg.norm(q), p @ q / (q @ q)
    assert mean <= bound
    assert 1 - mean > 9 * bound

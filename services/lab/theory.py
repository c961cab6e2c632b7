"""`heterorl lab theory`: what the theorems on GEPO's weight say, computed exactly on small policies.

Weights under y ~ q, p the learner's policy: p/q (gspo), p/E_q[q] (the paper's group weight), p/max(q, E_q[q]), p/max q.
With G draws: the same with E = Σ q_j² / Σ q_j and max_j q_j of the group, which is what the losses compute.

Theorem 1 (arXiv 2508.17850): Var[p/q] - Var[p/E_q q] ≥ exp(KL(p‖q)) - (n² + 1).
Theorem 2: E_q[p / E_q q] = ⟨p, q⟩ / ‖q‖² ≤ ‖p‖ / ‖q‖; on two outcomes that bounds the bias too, on many it does not.
Proposition 3 (ours, docs/gepo.md): p/max(q_i, E) and p/max_j q_j have second moments at most those of p/q and of p/E.
Proposition 4 (ours): of w = p / (q_i^(1-λ) max_j q_j^λ), which is gepo_fresh's weight, the second moment falls with λ
and is log-convex in it, and 0 ≤ 1 - E_q[w] ≤ λ E_p[log(max_j q_j / q_i)].
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
WEIGHTS = ("own", "group", "bound", "max")
"""p/q_i, p/E, p/max(q_i, E), p/max_j q_j."""
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""λ of the denominators between q_i and max_j q_j."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Of one weight under q: on a grid, arrays of its shape."""

    mean: Array
    second: Array

    @property
    def variance(self) -> Array:
        return self.second - self.mean**2


@dataclass(frozen=True, slots=True, kw_only=True)
class BernoulliGrid:
    """`p` down, `q` across: chances of the first of two outcomes, cell centres between 0 and 1."""

    chances: Array
    kl: Array
    exact: dict[str, Moments]
    """With E_q[q] and max q themselves."""
    drawn: dict[str, Moments]
    """With the estimates from a group of `group_size` draws."""
    blended: dict[float, Moments]
    """By λ, with the group's max_j q_j."""
    log_gap: Array
    """E_p[log(max_j q_j / q_i)], the other draws from q."""
    group_size: int

    @property
    def theorem_1_slack(self) -> Array:
        """Left side minus right side: 0 or more everywhere, if the theorem holds."""
        gain = self.exact["own"].variance - self.exact["group"].variance
        return gain - (np.exp(self.kl) - 5.0)

    @property
    def theorem_2_slack(self) -> Array:
        p, q = self.chances[:, None], self.chances[None, :]
        bound = np.sqrt(p**2 + (1 - p) ** 2) / np.sqrt(q**2 + (1 - q) ** 2)
        return bound - self.exact["group"].mean


def bernoulli_grid(points: int = 200, group_size: int = 8) -> BernoulliGrid:
    chances = (np.arange(points) + 0.5) / points
    p, q = chances[:, None], chances[None, :]
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    expected, largest = q**2 + (1 - q) ** 2, np.maximum(q, 1 - q)
    exact = _moments_of(p, q, {"group": expected, "max": largest})
    drawn = {name: [np.zeros_like(kl), np.zeros_like(kl)] for name in WEIGHTS}
    blended = {blend: [np.zeros_like(kl), np.zeros_like(kl)] for blend in BLENDS}
    log_gap = np.zeros_like(kl)
    # A group is told by how many of its draws are the first outcome.
    for first in range(group_size + 1):
        share = first / group_size
        ways = math.lgamma(group_size + 1) - math.lgamma(first + 1) - math.lgamma(group_size - first + 1)
        chance = np.exp(ways + first * np.log(q) + (group_size - first) * np.log1p(-q))
        contraharmonic = (share * q**2 + (1 - share) * (1 - q) ** 2) / (share * q + (1 - share) * (1 - q))
        top = q if first == group_size else 1 - q if first == 0 else largest
        for name, moments in _moments_of(p, q, {"group": contraharmonic, "max": top}, share).items():
            drawn[name][0] += chance * moments.mean
            drawn[name][1] += chance * moments.second
        for blend, sums in blended.items():
            weights = p / (q ** (1 - blend) * top**blend), (1 - p) / ((1 - q) ** (1 - blend) * top**blend)
            for power, total in enumerate(sums, 1):
                total += chance * (share * weights[0] ** power + (1 - share) * weights[1] ** power)
        log_gap += chance * (share * p / q * np.log(top / q) + (1 - share) * (1 - p) / (1 - q) * np.log(top / (1 - q)))
    return BernoulliGrid(
        chances=chances,
        kl=kl,
        exact=exact,
        drawn={name: Moments(mean=mean, second=second) for name, (mean, second) in drawn.items()},
        blended={blend: Moments(mean=mean, second=second) for blend, (mean, second) in blended.items()},
        log_gap=log_gap,
        group_size=group_size,
    )


def _moments_of(p: Array, q: Array, given: dict[str, Array], share: float | None = None) -> dict[str, Moments]:
    """Mean and second moment of each weight over one draw. `share` of a group's draws are the first outcome; without
    it the chance is q."""
    frequency = q if share is None else np.full_like(q, share)
    found: dict[str, Moments] = {}
    for name in WEIGHTS:
        first = p / _denominator(name, q, given)
        second = (1 - p) / _denominator(name, 1 - q, given)
        found[name] = Moments(
            mean=frequency * first + (1 - frequency) * second,
            second=frequency * first**2 + (1 - frequency) * second**2,
        )
    return found


def _denominator(name: str, own: Array, given: dict[str, Array]) -> Array:
    match name:
        case "own":
            return own
        case "bound":
            return np.maximum(own, given["group"])
        case _:
            return given[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianLine:
    """p = N(gap, 1), q = N(0, 1)."""

    gaps: Array
    moments: dict[str, Moments]
    blended: dict[float, Moments]
    log_gap: Array

    @property
    def crossing(self) -> float:
        """The gap at which the group weight's variance falls below that of p/q, by linear interpolation."""
        gain = self.moments["own"].variance - self.moments["group"].variance
        after = int(np.argmax(gain > 0))
        share = -gain[after - 1] / (gain[after] - gain[after - 1])
        return float(self.gaps[after - 1] + share * (self.gaps[after] - self.gaps[after - 1]))


def gaussian_line(most: float = 2.0, points: int = 401) -> GaussianLine:
    """Integrals by the trapezoid rule on [-12, 12 + most], exact to rounding for such smooth functions."""
    gaps = np.linspace(0.0, most, points)
    x = np.linspace(-12.0, 12.0 + 3 * most, 6001)
    q = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    expected, largest = 1 / (2 * math.sqrt(math.pi)), 1 / math.sqrt(2 * math.pi)
    p = np.exp(-((x[None, :] - gaps[:, None]) ** 2) / 2) / math.sqrt(2 * math.pi)
    given = {"group": np.full_like(q, expected), "max": np.full_like(q, largest)}
    step = x[1] - x[0]
    moments: dict[str, Moments] = {}
    for name in WEIGHTS:
        weight = p / np.maximum(_denominator(name, q, given), 1e-300)
        moments[name] = Moments(mean=(weight * q).sum(1) * step, second=(weight**2 * q).sum(1) * step)
    blended: dict[float, Moments] = {}
    for blend in BLENDS:
        weight = p / (np.maximum(q, 1e-300) ** (1 - blend) * largest**blend)
        blended[blend] = Moments(mean=(weight * q).sum(1) * step, second=(weight**2 * q).sum(1) * step)
    log_gap = (p * np.log(largest / np.maximum(q, 1e-300))).sum(1) * step
    return GaussianLine(gaps=gaps, moments=moments, blended=blended, log_gap=log_gap)


def blend_findings(blended: dict[float, Moments], log_gap: Array) -> dict[str, bool]:
    """Whether each statement of Proposition 4 holds at every point."""
    slack = 1 + 1e-6
    seconds = [blended[blend].second for blend in BLENDS]
    first, last = seconds[0], seconds[-1]
    biases = [1.0 - blended[blend].mean for blend in BLENDS]
    return {
        "second_moment_falls": all(bool((b <= a * slack).all()) for a, b in itertools.pairwise(seconds)),
        "second_moment_is_log_convex": all(
            bool((second <= first ** (1 - blend) * last**blend * slack).all())
            for blend, second in zip(BLENDS, seconds, strict=True)
        ),
        "bias_within_bound": all(
            bool((bias >= -1e-6).all() and (bias <= blend * log_gap + 1e-6).all())
            for blend, bias in zip(BLENDS, biases, strict=True)
        ),
    }


def findings(grid: BernoulliGrid, line: GaussianLine) -> dict[str, object]:
    """The numbers of docs/gepo.md: where the theorems hold, and on what share of the grid each weight is the larger."""

    def share(condition: NDArray[np.bool_]) -> float:
        return float(f"{condition.mean():.4f}")

    tiny = 1e-9
    result: dict[str, object] = {
        "points": len(grid.chances) ** 2,
        "theorem_1_holds_share": share(grid.theorem_1_slack >= -tiny),
        "theorem_1_bound_is_positive_share": share(np.exp(grid.kl) > 5.0),
        "theorem_2_holds_share": share(grid.theorem_2_slack >= -tiny),
        "gaussian_theorem_2_holds_share": share(line.moments["group"].mean <= 1.0 + tiny),
        "gaussian_crossing_gap": round(line.crossing, 4),
        "group_size": grid.group_size,
    }
    for label, moments in (("exact", grid.exact), ("drawn", grid.drawn)):
        larger = moments["group"].variance > moments["own"].variance + tiny
        result[f"{label}_group_variance_larger_share"] = share(larger)
        if larger.any():
            result[f"{label}_group_variance_larger_kl_median"] = float(f"{np.median(grid.kl[larger]):.4g}")
        for name in ("bound", "max"):
            ours, least = moments[name], np.minimum(moments["own"].second, moments["group"].second)
            result[f"{label}_{name}_second_moment_never_above_either"] = bool((ours.second <= least * (1 + tiny)).all())
            result[f"{label}_{name}_variance_larger_than_own_share"] = share(
                ours.variance > moments["own"].variance + tiny
            )
            result[f"{label}_{name}_variance_larger_than_group_share"] = share(
                ours.variance > moments["group"].variance + tiny
            )
        for name in WEIGHTS:
            result[f"{label}_{name}_mean_weight_error"] = float(f"{np.abs(moments[name].mean - 1).mean():.4f}")
    for label, moments, log_gap in (("drawn", grid.blended, grid.log_gap), ("gaussian", line.blended, line.log_gap)):
        for name, holds in blend_findings(moments, log_gap).items():
            result[f"{label}_proposition_4_{name}"] = holds
        for blend in BLENDS[1:-1]:
            result[f"{label}_blend_{blend:g}_mean_weight_error"] = float(
                f"{np.abs(moments[blend].mean - 1).mean():.4f}"
            )
    return result

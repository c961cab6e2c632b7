"""Delay models: distribution, clipping, seeds, traces."""

import math
import statistics
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.runtime.errors import BadInputError, InputMissingError
from services.sampler.delays import DelayKind, DelayModel, Delays, DelaySection

MANY = 4000


def draws(count: int = MANY, seed: int = 0, sampler: str = "a", link: str = "weights", **keys: object) -> list[float]:
    delays = Delays(DelayModel.model_validate(keys), seed, sampler, link)
    return [delays.next_s() for _ in range(count)]


def unclipped(**keys: object) -> list[float]:
    return draws(min_s=0.0, max_s=1e9, **keys)


@pytest.mark.parametrize("kind", [kind for kind in DelayKind if kind not in (DelayKind.NONE, DelayKind.TRACE)])
def test_every_model_stays_between_a_minute_and_half_an_hour(kind: DelayKind) -> None:
    found = draws(kind=kind)
    assert min(found) >= 60.0
    assert max(found) <= 1800.0


def test_the_lognormal_has_the_papers_parameters() -> None:
    logs = [math.log(delay) for delay in unclipped(kind="lognormal")]
    assert statistics.fmean(logs) == pytest.approx((math.log(60) + math.log(1920)) / 2, abs=0.03)
    assert statistics.stdev(logs) == pytest.approx(0.617, abs=0.03)


def test_the_weibull_has_the_papers_mean_and_median() -> None:
    found = unclipped(kind="weibull")
    assert statistics.fmean(found) == pytest.approx(865.0 * math.gamma(1 + 1 / 2.245), rel=0.03)
    assert statistics.median(found) == pytest.approx(865.0 * math.log(2) ** (1 / 2.245), rel=0.03)


def test_the_exponential_has_its_mean_and_a_standard_deviation_that_equals_it() -> None:
    found = unclipped(kind="exponential", mean_s=300.0)
    assert statistics.fmean(found) == pytest.approx(300.0, rel=0.06)
    assert statistics.stdev(found) == pytest.approx(300.0, rel=0.08)


def test_the_uniform_fills_its_interval_evenly() -> None:
    found = draws(kind="uniform", min_s=100.0, max_s=500.0)
    assert statistics.fmean(found) == pytest.approx(300.0, rel=0.03)
    assert sum(delay < 200.0 for delay in found) / MANY == pytest.approx(0.25, abs=0.03)


def test_a_constant_is_constant_and_none_is_nothing() -> None:
    assert draws(3, kind="constant", mean_s=90.0) == [90.0] * 3
    assert draws(3, kind="none") == [0.0] * 3


@pytest.mark.parametrize("keys", [{"kind": "lognormal", "mu": 1800.0}, {"kind": "weibull", "shape": 1e-4}])
def test_a_draw_beyond_every_float_is_the_longest_delay(keys: dict[str, object]) -> None:
    assert max(draws(100, **keys)) == 1800.0


def test_each_sampler_and_each_link_draws_its_own_delays_again_and_again_the_same() -> None:
    first = draws(5, kind="lognormal")
    assert draws(5, kind="lognormal") == first
    assert draws(5, kind="lognormal", sampler="b") != first
    assert draws(5, kind="lognormal", link="rollouts") != first
    assert draws(5, kind="lognormal", seed=1) != first


def test_a_trace_is_taken_in_order_and_over_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("70\n80\n\n90\n")
    found = draws(7, kind="trace", trace=path)
    start = [70.0, 80.0, 90.0].index(found[0])
    assert found == [[70.0, 80.0, 90.0][(start + place) % 3] for place in range(7)]


@pytest.mark.parametrize("text", ["", "60\nsoon\n", "-1\n", "nan\n"])
def test_a_trace_that_holds_no_delays_is_bad_input(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"trace\.txt"):
        draws(1, kind="trace", trace=path)


def test_a_trace_that_is_not_there_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="cannot be read"):
        draws(1, kind="trace", trace=tmp_path / "none.txt")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValidationError, match="above max_s"):
        DelayModel(min_s=10.0, max_s=1.0)
    with pytest.raises(ValidationError, match="needs trace"):
        DelayModel(kind=DelayKind.TRACE)


def test_a_sampler_has_no_delay_unless_it_is_asked_for() -> None:
    assert DelaySection().weights.kind is DelayKind.NONE
    assert DelaySection().rollouts.kind is DelayKind.NONE

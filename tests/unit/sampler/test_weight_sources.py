"""When a relay is asked, and when the learner is."""

from typing import Any, cast

from services.runtime.errors import UnavailableError
from services.sampler.weight_sources import WeightSources

NOBODY = cast("Any", object())
"""A stub that is never called."""
AWAY = UnavailableError("away")


def sources_at(now_s: list[float]) -> WeightSources:
    return WeightSources(NOBODY, NOBODY, aside_s=30.0, clock=lambda: now_s[0])


def test_without_a_relay_the_learner_is_all_there_is() -> None:
    sources = WeightSources(NOBODY)
    assert sources.current is sources.learner
    assert not sources.failed(sources.learner, AWAY)
    assert sources.fallbacks == 0


def test_a_relay_that_fails_is_left_for_a_while_and_then_asked_again() -> None:
    now_s = [0.0]
    sources = sources_at(now_s)
    relay = sources.current
    assert relay.is_relay
    assert sources.failed(relay, AWAY)
    assert sources.current is sources.learner
    now_s[0] = 29.9
    assert sources.current is sources.learner
    now_s[0] = 30.0
    assert sources.current is relay


def test_each_further_failure_doubles_the_wait_up_to_ten_minutes_and_success_resets_it() -> None:
    now_s = [0.0]
    sources = sources_at(now_s)
    relay = sources.current
    waits: list[float] = []
    for _ in range(7):
        sources.failed(relay, AWAY)
        began = now_s[0]
        while sources.current is sources.learner:
            now_s[0] += 1.0
        waits.append(now_s[0] - began)
    assert waits == [30, 60, 120, 240, 480, 600, 600]
    sources.worked(relay)
    sources.failed(relay, AWAY)
    now_s[0] += 30.0
    assert sources.current is relay


def test_failures_of_calls_that_were_under_way_together_count_once() -> None:
    now_s = [0.0]
    sources = sources_at(now_s)
    relay = sources.current
    assert sources.failed(relay, AWAY)
    assert sources.failed(relay, AWAY), "and the second goes to the learner too"
    assert sources.fallbacks == 1
    now_s[0] = 30.0
    assert sources.current is relay

"""The reconnect delays: their bounds, and how a drain cuts them short."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from services.runtime.backoff import Backoff, set_within


def highest(_: float, bound: float) -> float:
    return bound


def test_the_bound_doubles_from_half_a_second_to_ten_and_falls_back_after_a_reset():
    backoff = Backoff(uniform=highest)
    assert [backoff.next_delay_s() for _ in range(7)] == [0.5, 1, 2, 4, 8, 10, 10]
    backoff.reset()
    assert (backoff.attempts, backoff.next_delay_s()) == (0, 0.5)


@given(st.integers(min_value=0, max_value=2000))
def test_a_delay_lies_between_zero_and_the_ceiling_after_any_number_of_attempts(attempts: int):
    backoff = Backoff()
    backoff.attempts = attempts
    assert 0 <= backoff.next_delay_s() <= 10


async def test_the_injected_wait_gets_the_delay_and_its_answer_is_passed_on():
    waits: list[float] = []

    async def wait_for(_: asyncio.Event, delay_s: float) -> bool:
        waits.append(delay_s)
        return len(waits) == 2

    backoff = Backoff(uniform=highest, wait_for=wait_for)
    assert [await backoff.wait(asyncio.Event()) for _ in range(2)] == [False, True]
    assert waits == [0.5, 1.0]


async def test_a_drain_ends_the_wait_at_once():
    drain = asyncio.Event()
    waiting = asyncio.ensure_future(Backoff(base_s=3600, ceiling_s=3600, uniform=highest).wait(drain))
    await asyncio.sleep(0)
    drain.set()
    async with asyncio.timeout(5):
        assert await waiting is True


async def test_an_event_that_stays_unset_is_reported_after_the_timeout():
    assert await set_within(asyncio.Event(), 0.001) is False

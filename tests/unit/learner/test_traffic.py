"""What the learner counts of the weights that it sends."""

import asyncio
import time

from services.learner.traffic import Traffic


def test_a_version_counts_once_whatever_plans_lead_to_it_and_in_whatever_order_objects_come() -> None:
    traffic = Traffic(0.0)
    traffic.planned("eu-1", 1, ["a", "b"], 1000)
    assert traffic.opened("eu-1", "a")
    traffic.planned("eu-1", 2, ["c"], 1000)
    assert traffic.opened("eu-1", "b"), "an older plan is still being fetched"
    assert traffic.opened("eu-1", "c")
    assert traffic.opened("eu-1", "a")
    traffic.planned("eu-1", 2, ["d"], 1000)
    assert traffic.opened("eu-1", "d")
    assert traffic.state() == {"eu-1": [0, 2, 2000]}


def test_objects_that_no_plan_named_are_not_weights() -> None:
    traffic = Traffic(0.0)
    traffic.planned("eu-1", 1, ["a"], 1000)
    assert not traffic.opened("eu-1", "model-file")
    assert not traffic.opened("us-1", "a")
    assert traffic.bytes_full == 0


def test_what_was_planned_longest_ago_is_forgotten_first() -> None:
    traffic = Traffic(0.0)
    for number in range(5000):
        traffic.planned("eu-1", number, [f"object-{number}"], 1)
    assert not traffic.opened("eu-1", "object-0")
    assert traffic.opened("eu-1", "object-4999")
    assert len(traffic.of("eu-1").planned) < 5000


async def test_each_receiver_has_a_byte_budget_of_its_own() -> None:
    traffic = Traffic(8.0)  # 1 MB/s

    async def send(name: str) -> float:
        began = time.monotonic()
        for _ in range(11):  # the first of them starts at once
            await traffic.pace(name, 10_000)
        return time.monotonic() - began

    began = time.monotonic()
    for seconds in await asyncio.gather(*map(send, ("a", "b", "c"))):
        assert seconds > 0.095
    assert time.monotonic() - began < 0.28, "one after another they would take 0.3 s"
    assert traffic.of("a").free_at_s - began > 0.105


async def test_what_a_receiver_gave_up_waiting_for_is_not_taken_from_its_budget() -> None:
    """It asks again for less: where a chunk takes longer than its patience it would wait ever longer."""
    traffic = Traffic(8.0, clock=lambda: 100.0)
    await traffic.pace("a", 10_000)
    for _ in range(5):
        waiting = asyncio.create_task(traffic.pace("a", 500_000_000))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert abs(traffic.of("a").free_at_s - 100.01) < 1e-6


def test_receivers_that_come_and_go_under_ever_new_names_are_counted_together() -> None:
    traffic = Traffic(0.0)
    for number in range(3000):
        for name in ("eu-1", f"spot-{number}"):
            traffic.planned(name, number, [f"object-{number}"], 10)
            assert traffic.opened(name, f"object-{number}")
            traffic.of(name).bytes_sent += 1
    assert len(traffic.state()) <= 1024
    assert (traffic.bytes_sent, traffic.bytes_full) == (6000, 60_000)
    assert (traffic.bytes_sent_to("eu-1"), traffic.bytes_sent_to("spot-0")) == (3000, 0)
    again = Traffic(0.0)
    again.restore(traffic.state())
    assert (again.state(), again.bytes_sent) == (traffic.state(), 6000)

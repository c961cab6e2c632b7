"""Virtual time."""

import asyncio
import time

import pytest

from services.lab.clock import VirtualDeadlockError, run_virtual


def test_half_an_hour_costs_nothing() -> None:
    async def main() -> float:
        await asyncio.sleep(1800.0)
        return asyncio.get_running_loop().time()

    started = time.monotonic()
    assert run_virtual(main()) == pytest.approx(1800.0)
    assert time.monotonic() - started < 60.0


def test_tasks_wake_in_the_order_of_their_timers() -> None:
    async def main() -> list[str]:
        seen: list[str] = []

        async def note(name: str, at_s: float) -> None:
            await asyncio.sleep(at_s)
            seen.append(name)

        async with asyncio.TaskGroup() as tasks:
            for name, at_s in (("late", 900.0), ("second", 60.5), ("first", 60.0), ("soon", 1.0)):
                tasks.create_task(note(name, at_s))
        return seen

    assert run_virtual(main()) == ["soon", "first", "second", "late"]


def test_time_does_not_pass_while_something_can_run() -> None:
    async def main() -> float:
        for _ in range(100):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 0.0


def test_timeouts_are_virtual_too() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300.0):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == pytest.approx(300.0)


def test_waiting_for_what_cannot_come_is_an_error_and_not_for_ever() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(VirtualDeadlockError):
        run_virtual(main())

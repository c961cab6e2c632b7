from dataclasses import dataclass

from services.sampler.idle import IdleReason, IdleTime


@dataclass(slots=True)
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def spent(idle: IdleTime) -> dict[str, float]:
    return {reason: seconds for reason, seconds in idle.seconds().items() if seconds}


def test_time_before_the_first_group_is_starting_and_then_waiting_for_leases() -> None:
    clock = Clock()
    idle = IdleTime(clock)
    clock.now += 7
    idle.set(IdleReason.STARTING, False)
    clock.now += 3
    assert spent(idle) == {"starting": 7.0, "waiting_for_leases": 3.0}


def test_no_time_is_idle_while_one_of_several_groups_is_in_the_engine() -> None:
    clock = Clock()
    idle = IdleTime(clock)
    idle.set(IdleReason.STARTING, False)
    with idle.generating():
        with idle.generating(), idle.held_up_by(IdleReason.SCORING):
            clock.now += 5
        clock.now += 5
        assert idle.groups_in_engine == 1
    assert spent(idle) == {}


def test_a_moment_counts_once_for_the_strongest_reason() -> None:
    clock = Clock()
    idle = IdleTime(clock)
    idle.set(IdleReason.STARTING, False)
    with idle.held_up_by(IdleReason.SCORING):
        clock.now += 1
        with idle.held_up_by(IdleReason.SPOOL_FULL):
            clock.now += 2
        idle.set(IdleReason.PAUSED, True)
        clock.now += 4
    clock.now += 8
    assert spent(idle) == {"scoring": 1.0, "spool_full": 2.0, "paused": 12.0}


def test_a_swap_is_idle_time_only_if_it_stopped_work() -> None:
    clock = Clock()
    idle = IdleTime(clock)
    idle.set(IdleReason.STARTING, False)
    idle.swapped(0.5)
    with idle.generating():
        idle.swapped(0.25)
    assert spent(idle) == {"swapping": 0.25}


def test_grading_holds_nothing_up_while_the_learner_is_asked_for_more() -> None:
    clock = Clock()
    idle = IdleTime(clock)
    idle.set(IdleReason.STARTING, False)
    with idle.held_up_by(IdleReason.SCORING):
        with idle.held_up_by(IdleReason.WAITING_FOR_LEASES):
            clock.now += 2
        clock.now += 3
    assert spent(idle) == {"waiting_for_leases": 2.0, "scoring": 3.0}

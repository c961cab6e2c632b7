"""What the learner keeps in memory does not grow with the steps, prompts and samplers of a run."""

import statistics
from pathlib import Path

from services.learner.dataset import PromptOrder
from services.learner.pacing import Pacing, PacingRules
from services.learner.run_state import RunState
from services.learner.work_list import WorkList
from tests.support.data_side import Clock, dataset

MANY = 20_000


def test_the_median_of_ratios_is_that_of_the_newest_versions() -> None:
    state = RunState()
    state.ratios.extend(float(version) for version in range(MANY))
    assert len(state.ratios) < MANY
    assert state.delta_ratio_median == statistics.median(state.ratios) > MANY / 2
    again = RunState()
    again.restore(MANY, state.to_json())
    assert again.delta_ratio_median == state.delta_ratio_median


def test_prompts_that_came_too_late_once_are_forgotten_and_one_that_does_so_again_and_again_is_given_up(
    tmp_path: Path,
) -> None:
    works = WorkList(PromptOrder(dataset(tmp_path), 7, shuffle=False), 2, lambda _: None)
    for number in range(MANY):
        works.reopen(number)
        works.remove(next(iter(works)))
    assert len(works._drops) < MANY
    granted = 0
    for _ in range(5):
        works.reopen(MANY)
        if (work := works.get(f"t{MANY}")) is not None:
            granted += 1
            works.remove(work)
    assert granted == 2


def test_the_delays_of_samplers_that_are_gone_are_forgotten() -> None:
    clock = Clock()
    pacing = Pacing(PacingRules(groups_per_step=1, max_staleness=4, ahead=1.0), clock)
    pacing.delivered("eu-1", 1000.0)
    for number in range(MANY):
        pacing.delivered(f"spot-{number}", 0.1)
        if number % 100 == 0:
            pacing.delivered("eu-1", 1000.0)
    assert len(pacing._delays) < MANY
    for _ in range(2):
        clock.advance(10.0)
        pacing.advanced()
    assert pacing.needed_version("eu-1", 9, 1, 0) is None
    assert pacing.needed_version("spot-7", 9, 1, 0) == 5

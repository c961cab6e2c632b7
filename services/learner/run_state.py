"""What the learner knows of its own progress: counters that the loop writes, and status and summary read."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import cast

from services.learner.mismatch import Mismatch
from services.learner.records import EVAL_ROUND, Record


class Phase(Enum):
    """LearnerPhase of the contract."""

    STARTING = 1
    EVALUATING = 2
    WAITING_FOR_GROUPS = 3
    TRAINING = 4
    PAUSED = 5
    FINISHING = 6


class Activity(Enum):
    """Where the learner's time goes; the names are keys of seconds_by_activity."""

    START = "start"
    EVALUATE = "evaluate"
    WAIT_GROUPS = "wait_groups"
    TRAIN = "train"
    PUBLISH = "publish"
    CHECKPOINT = "checkpoint"
    PAUSE = "pause"
    FINISH = "finish"


PHASES = {
    Activity.START: Phase.STARTING,
    Activity.EVALUATE: Phase.EVALUATING,
    Activity.WAIT_GROUPS: Phase.WAITING_FOR_GROUPS,
    Activity.TRAIN: Phase.TRAINING,
    Activity.PUBLISH: Phase.TRAINING,
    Activity.CHECKPOINT: Phase.TRAINING,
    Activity.PAUSE: Phase.PAUSED,
    Activity.FINISH: Phase.FINISHING,
}
_MOST_RATIOS = 4096
"""Versions whose median a status shows: it is computed anew for each."""
_IN_TRAINING = (Activity.WAIT_GROUPS, Activity.TRAIN, Activity.PUBLISH, Activity.CHECKPOINT, Activity.PAUSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPoint:
    """One evaluation; `wall_s` counts over restarts, like every wall_s here."""

    round: int
    policy_version: int
    accuracy: float
    prompts: int
    wall_s: float


@dataclass(slots=True, kw_only=True)
class RunState:
    """`clock` is monotonic seconds. Exactly one activity goes on at any time."""

    clock: Callable[[], float] = time.monotonic
    step: int = 0
    """Optimizer steps taken; equals the version that the newest of them makes."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    evals: list[EvalPoint] = field(default_factory=list[EvalPoint])
    ratios: deque[float] = field(default_factory=lambda: deque[float](maxlen=_MOST_RATIOS))
    """Full size / update size of the newest versions that were deltas."""
    mismatch: dict[str, Mismatch] = field(default_factory=dict[str, Mismatch])
    """Of the last step with rows of staleness 0, by sampler."""
    settings: Mapping[str, object] = field(default_factory=dict[str, object])
    """What decides which policy comes out (settings_record)."""
    restarts: int = 0
    activity: Activity = Activity.START
    _seconds: dict[Activity, float] = field(default_factory=dict[Activity, float])
    _since: float = 0.0
    _started: float = 0.0
    _prior_wall_s: float = 0.0

    def __post_init__(self) -> None:
        self._started = self._since = self.clock()

    def switch(self, activity: Activity) -> None:
        """From now on the learner does this."""
        now = self.clock()
        self._seconds[self.activity] = self._seconds.get(self.activity, 0.0) + now - self._since
        self.activity, self._since = activity, now

    @property
    def phase(self) -> Phase:
        return PHASES[self.activity]

    @property
    def uptime_s(self) -> float:
        """Since this process started."""
        return self.clock() - self._started

    @property
    def wall_s(self) -> float:
        """Seconds that learners have run for this run."""
        return self._prior_wall_s + self.uptime_s

    @property
    def seconds(self) -> dict[str, float]:
        """By activity, the one that goes on included."""
        now = dict(self._seconds)
        now[self.activity] = now.get(self.activity, 0.0) + self.clock() - self._since
        return {activity.value: spent for activity, spent in now.items()}

    @property
    def idle_share(self) -> float:
        """Share of the time in training that was spent waiting for groups; evaluation that gates training, start and
        end do not count."""
        seconds = self.seconds
        total = sum(seconds.get(activity.value, 0.0) for activity in _IN_TRAINING)
        return seconds.get(Activity.WAIT_GROUPS.value, 0.0) / total if total else 0.0

    @property
    def delta_ratio_median(self) -> float:
        return statistics.median(self.ratios) if self.ratios else 0.0

    def to_json(self) -> dict[str, object]:
        """For the checkpoint."""
        return {
            "wall_s": self.wall_s,
            "seconds": self.seconds,
            "ratios": [*self.ratios],
            "restarts": self.restarts,
            "settings": self.settings,
            "evals": [{name: getattr(point, name) for name in EvalPoint.__dataclass_fields__} for point in self.evals],
        }

    def restore(self, step: int, saved: Mapping[str, object]) -> None:
        """Goes on from `to_json`'s values after `step`."""
        self.step = step
        self._prior_wall_s = cast(float, saved["wall_s"])
        for name, spent in cast("Mapping[str, float]", saved["seconds"]).items():
            self._seconds[Activity(name)] = self._seconds.get(Activity(name), 0.0) + spent
        self.ratios.extend(cast("list[float]", saved["ratios"]))
        self.restarts = cast(int, saved["restarts"]) + 1
        self.evals = [
            EvalPoint(
                round=int(point["round"]),
                policy_version=int(point["policy_version"]),
                accuracy=point["accuracy"],
                prompts=int(point["prompts"]),
                wall_s=point["wall_s"],
            )
            for point in cast("list[Mapping[str, float]]", saved["evals"])
        ]

    def add_evals(self, records: Iterable[Record]) -> None:
        """Those that the checkpoint did not hold yet. A journal that is newer or older than it counts rounds anew."""
        known = {(point.round, point.policy_version) for point in self.evals}
        for record in records:
            number = int(record.metrics[EVAL_ROUND])
            if (number, record.step) not in known:
                point = EvalPoint(
                    round=number,
                    policy_version=record.step,
                    accuracy=record.metrics["accuracy"],
                    prompts=int(record.metrics["eval_prompts"]),
                    wall_s=record.wall_s,
                )
                self.evals.append(point)

"""Every prompt that the run wants answered: open, out, waiting to be granted (again), or given up."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from services.learner.dataset import PromptOrder
from services.learner.work import Work
from services.wire.types import LeasePurpose, Prompt

_MAX_GRANTS = 8
"""A prompt that so many grants did not get answered is given up: it may be what kills its samplers."""
_MAX_DROPS = 3
"""A prompt whose groups came too late so often is given up: it is slower than the staleness bound allows."""

_MOST_DROPPED = 16_384
"""Prompts whose drops are remembered, those dropped first forgotten first: few of them come so late again."""
_ENOUGH_CALLERS = 2
"""Samplers that must call a prompt unusable, where there are so many."""


class WorkList:
    """`on_given_up` hears of each work that nobody will be asked for again. Not thread-safe, and never waits."""

    def __init__(self, order: PromptOrder, group_size: int, on_given_up: Callable[[Work], None]) -> None:
        self._order = order
        self._group_size = group_size
        self._on_given_up = on_given_up
        self._open: dict[str, Work] = {}
        self._train: deque[str] = deque()
        self._eval: deque[str] = deque()
        self._drops: dict[int, int] = {}
        self._called_unusable: dict[str, set[str]] = {}
        self._unusable: set[str] = set()
        self._lost: set[int] = set()
        self.following = 0
        """Number of the next new training prompt."""

    def __iter__(self) -> Iterator[Work]:
        return iter(self._open.values())

    def get(self, key: str) -> Work | None:
        return self._open.get(key)

    @property
    def all_unusable(self) -> bool:
        """No sampler could answer any prompt of the data set."""
        return len(self._unusable) == len(self._order)

    @property
    def floor(self) -> int:
        """Training prompts below this number are answered or given up, or found to be lost at each start."""
        open_ = (work.number for work in self if work.purpose is LeasePurpose.TRAIN and work.number not in self._lost)
        return min(open_, default=self.following)

    def restore(self, following: int, floor: int, answered: set[int], lost: set[int], orphaned_until: float) -> None:
        """Prompts whose groups are `lost` wait to be granted again; others in [floor, following) that no group answered
        become orphans."""
        self.following = following
        self._lost = lost
        self.put_back([self._open_training(number) for number in lost])
        for number in range(floor, following):
            if number not in answered and number not in lost:
                work = self._open_training(number)
                work.orphaned_until = orphaned_until

    def next_training(self) -> Work | None:
        """A returned prompt, else a new one; None when every prompt of the data set is unusable."""
        if self._train:
            return self._open[self._train.popleft()]
        for _ in range(len(self._order)):
            number, self.following = self.following, self.following + 1
            if self._order.at(number).prompt_id not in self._unusable:
                return self._open_training(number)
        return None

    def _open_training(self, number: int) -> Work:
        work = Work(
            key=f"t{number}",
            prompt=self._order.at(number),
            purpose=LeasePurpose.TRAIN,
            group_size=self._group_size,
            number=number,
        )
        self._open[work.key] = work
        return work

    def add_eval(self, round_number: int, version: int, prompts: Sequence[Prompt], samples: int) -> None:
        for index, prompt in enumerate(prompts):
            work = Work(
                key=f"e{round_number}.{index}",
                prompt=prompt,
                purpose=LeasePurpose.EVAL,
                group_size=samples,
                eval_round=round_number,
                eval_index=index,
                min_eval_version=version,
            )
            self._open[work.key] = work
            self._eval.append(work.key)

    def eval_waiting(self) -> tuple[Work, ...]:
        """Evaluation prompts that nobody works on."""
        return tuple(self._open[key] for key in self._eval)

    def eval_open(self) -> tuple[Work, ...]:
        """Evaluation prompts without an answer."""
        return tuple(work for work in self if work.purpose is LeasePurpose.EVAL)

    def unqueue(self, work: Work) -> None:
        """Somebody works on it."""
        for queue in (self._train, self._eval):
            if work.key in queue:
                queue.remove(work.key)

    def keep(self, work: Work) -> None:
        """It was removed, but whoever worked on it still does."""
        self._open[work.key] = work

    def put_back(self, works: Sequence[Work]) -> None:
        """Nobody works on these any more: to be granted before new prompts, or given up after too many tries."""
        for work in sorted(works, key=lambda work: (work.number, work.eval_index)):
            work.holder = None
            work.orphaned_until = None
            self._open[work.key] = work
            if work.grants >= _MAX_GRANTS:
                self.give_up(work)
            else:
                (self._train if work.purpose is LeasePurpose.TRAIN else self._eval).append(work.key)

    def reopen(self, number: int) -> None:
        """The accepted group of this training prompt was dropped."""
        drops = self._drops[number] = self._drops.pop(number, 0) + 1
        if len(self._drops) > _MOST_DROPPED:
            del self._drops[next(iter(self._drops))]
        if drops < _MAX_DROPS and f"t{number}" not in self._open:
            work = self._open_training(number)
            work.reopened = True
            self.put_back([work])

    def give_up(self, work: Work) -> None:
        self.remove(work)
        self._on_given_up(work)

    def call_unusable(self, prompt: Prompt, sampler_id: str, samplers: int) -> None:
        """This sampler says that the fault lies in the prompt. Where another of the `samplers` says so too, or there is
        no other, later passes over the data skip it: one host with broken graders must not use a data set up."""
        callers = self._called_unusable.setdefault(prompt.prompt_id, set())
        callers.add(sampler_id)
        if len(callers) >= min(_ENOUGH_CALLERS, samplers):
            self._unusable.add(prompt.prompt_id)

    def remove(self, work: Work) -> None:
        self.unqueue(work)
        self._open.pop(work.key, None)

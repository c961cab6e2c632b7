"""Evaluation rounds: held-out prompts, generated and scored by the samplers, never trained on.

start ─► leases of purpose EVAL (before training leases, spread over all samplers) ─► answers ─► result
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from services.learner.leases import LeaseTable
from services.wire.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    round: int
    policy_version: int
    """The learner's version when the round began: every completion is by it or by a later one."""
    accuracy: float
    """Mean over prompts of the mean reward of their completions; 0 to 1 for correctness rewards. NaN if none came."""
    prompts: int
    """Prompts that were answered."""
    given_up: int
    """Prompts that no sampler could answer: too long, or ungradable."""
    tokens: int
    """Completion tokens."""


class EvalRound:
    """Prompts by their place in the round."""

    def __init__(self, number: int, version: int, prompts: int) -> None:
        self.number = number
        self.version = version
        self._open = set(range(prompts))
        self._rewards: dict[int, float] = {}
        self._given_up = 0
        self._tokens = 0
        self._done = asyncio.Event()
        self._close_if_complete()

    def answer(self, index: int, group: ScoredGroup) -> None:
        self._open.discard(index)
        rewards = [completion.reward for completion in group.completions]
        self._rewards[index] = sum(rewards) / len(rewards)
        self._tokens += sum(len(completion.token_ids) for completion in group.completions)
        self._close_if_complete()

    def give_up(self, index: int) -> None:
        self._open.discard(index)
        self._given_up += 1
        self._close_if_complete()

    @property
    def left(self) -> int:
        """Prompts without an answer."""
        return len(self._open)

    async def result(self) -> EvalResult:
        """Waits until every prompt is answered or given up."""
        await self._done.wait()
        answered = len(self._rewards)
        return EvalResult(
            round=self.number,
            policy_version=self.version,
            accuracy=sum(self._rewards.values()) / answered if answered else float("nan"),
            prompts=answered,
            given_up=self._given_up,
            tokens=self._tokens,
        )

    def _close_if_complete(self) -> None:
        if not self._open:
            self._done.set()


class Evaluation:
    """`number` draws round numbers that never come twice in a run."""

    def __init__(self, leases: LeaseTable, number: Callable[[], Awaitable[int]]) -> None:
        self._leases = leases
        self._number = number
        self._rounds: dict[int, EvalRound] = {}

    async def start(self, version: int, prompts: Sequence[Prompt], samples: int) -> EvalRound:
        """Leases the prompts out, `samples` completions for each, to be written by `version` or a later one."""
        opened = EvalRound(await self._number(), version, len(prompts))
        self._rounds[opened.number] = opened
        self._leases.add_eval(opened.number, version, prompts, samples)
        return opened

    def cancel(self, opened: EvalRound) -> None:
        """Ends a round early: its leases are void, answers that still come are LEASE_LOST."""
        self._rounds.pop(opened.number, None)
        self._leases.drop_eval(opened.number)

    def answer(self, round_number: int, index: int, group: ScoredGroup) -> None:
        if (opened := self._rounds.get(round_number)) is not None:
            opened.answer(index, group)
            self._forget_if_complete(opened)

    def give_up(self, round_number: int, index: int) -> None:
        if (opened := self._rounds.get(round_number)) is not None:
            opened.give_up(index)
            self._forget_if_complete(opened)

    def _forget_if_complete(self, opened: EvalRound) -> None:
        if opened.left == 0:
            self._rounds.pop(opened.number, None)
        self._leases.wake()

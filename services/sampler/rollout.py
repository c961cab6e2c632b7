"""From leases to spooled groups.

    lease ─► wait for its policy version ─► render ─► generate G under one version ─► score ─► [delay] ─► spool
      └ per lease one task; at most `generating` in the engine; scoring of one group overlaps generating of the next

A lease ends in the spool, or is released with a reason and counted. It is renewed by heartbeats until its group is
acknowledged.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heterorl.v1 import control_pb2
from services.runtime import failpoints
from services.runtime.backoff import Backoff, set_within
from services.runtime.errors import EngineError, ExhaustedError, ScoreError, UnavailableError
from services.runtime.log import get_logger
from services.sampler.delays import NO_DELAYS, Delays
from services.sampler.engine import Engine, Generated, GenerateRequest
from services.sampler.follower import Follower
from services.sampler.idle import IdleReason
from services.sampler.scoring import GroupScorer, GroupScores
from services.sampler.session import LearnerSession
from services.sampler.spool import Spool
from services.sampler.tally import Tally
from services.wire.channel import MESSAGE_BYTES
from services.wire.convert import encode_group, from_lease, to_session
from services.wire.types import Completion, Lease, LeasePurpose, SamplingSettings, ScoredGroup

if TYPE_CHECKING:  # generated stubs exist for type checkers only; a tokenizer brings transformers
    from heterorl.v1.control_pb2_grpc import ControlServiceAsyncStub
    from services.sampler.prompts import PromptCodec

_log = get_logger("sampler.rollout")
_LEASE_WAIT_MS = 10_000
_LEASE_TIMEOUT_S = 20.0
_RELEASE_TIMEOUT_S = 5.0
_GENERATE_ATTEMPTS = 3
_OUR_FAULTS = ("generation_failed", "scoring_failed")
_ASK_WHY = ("paused", "draining", "weights")
"""Reasons of LeasePromptsResponse that a heartbeat's answer explains, or its report ends: it names the weights held."""
_PAYLOAD_BYTES = MESSAGE_BYTES - 4096
"""Largest group that fits a message with its envelope."""


class _GivenUp(Exception):  # noqa: N818 - an outcome of one lease, not an error of the process
    """`reason` is one of ReleaseLeases."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLimits:
    """`leases`: held at once. `generating`: groups in the engine at once. `scoring`: groups at the graders at once."""

    leases: int
    generating: int
    scoring: int


class Rollout:
    def __init__(
        self,
        *,
        control: "ControlServiceAsyncStub",
        session: LearnerSession,
        follower: Follower,
        engine: Engine,
        prompts: "PromptCodec",
        scorer: GroupScorer,
        spool: Spool,
        tally: Tally,
        limits: RolloutLimits,
        news: asyncio.Event,
        delays: Delays = NO_DELAYS,
    ) -> None:
        """`news` is set when leases are first refused for another reason than lack of work: a heartbeat tells which."""
        self._control = control
        self._session = session
        self._follower = follower
        self._engine = engine
        self._prompts = prompts
        self._scorer = scorer
        self._spool = spool
        self._tally = tally
        self._limits = limits
        self._news = news
        self._no_leases = ""
        self._delays = delays
        self._delayed = 0
        self._hurry = asyncio.Event()
        self._failing = Backoff()
        """A sampler that can make no group would else use up, by the hundred a second, the tries that prompts have."""
        self._generating = asyncio.Semaphore(limits.generating)
        self._scoring = asyncio.Semaphore(limits.scoring)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._started: set[str] = set()
        self._spooled: dict[int, str] = {}
        self._room = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self.paused = False
        self.draining = False

    @property
    def in_engine(self) -> int:
        """Groups that the engine works on."""
        return self._tally.idle.groups_in_engine

    @property
    def lease_ids(self) -> tuple[str, ...]:
        """Leases to renew: worked on, or spooled and not yet acknowledged."""
        return (*self._tasks, *self._spooled.values())

    def pause(self, paused: bool) -> None:
        """Stops asking for leases, or goes on; groups in flight are finished."""
        self.paused = paused
        (self._open.clear if paused else self._open.set)()
        self._tally.idle.set(IdleReason.PAUSED, paused)

    def abandon(self, lease_ids: Sequence[str]) -> None:
        """Stops work on leases that the learner has given to others."""
        for lease_id in lease_ids:
            if (task := self._tasks.get(lease_id)) is not None:
                self._tally.dropped["lease_lost"] += 1
                _log.info("lease_lost", lease_id=lease_id)
                task.cancel()

    def acknowledged(self, through_seq: int) -> None:
        """The learner has these groups: their leases are done."""
        for seq in [seq for seq in self._spooled if seq <= through_seq]:
            del self._spooled[seq]

    async def run(self) -> None:
        """For ever: keeps leases and works on them. On cancel: the groups in flight are dropped, and their leases
        expire at the learner. Raises FencedError, RefusedError, ConfigError from the learner."""
        backoff = Backoff()
        self._tally.idle.set(IdleReason.STARTING, False)
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._open.wait()
                with self._tally.idle.held_up_by(IdleReason.SPOOL_FULL):
                    await self._spool.leasing_room.wait()
                free = self._limits.leases - (len(self._tasks) - self._delayed)  # those are as good as sent
                if free <= 0:
                    self._room.clear()
                    await self._room.wait()
                    continue
                try:
                    with self._tally.idle.held_up_by(IdleReason.WAITING_FOR_LEASES):
                        leases = await self._lease(free)
                except (UnavailableError, ExhaustedError) as error:
                    self._session.check_patience()
                    wait_s = backoff.next_delay_s()
                    _log.info("leasing_failed", error=error, retry_s=round(wait_s, 2))
                    await asyncio.sleep(wait_s)
                    continue
                backoff.reset()
                if leases and self.draining:
                    await self._release([lease.lease_id for lease in leases], "drain")
                    continue
                for lease in leases:
                    self._begin(tasks, lease)

    async def finish(self) -> None:
        """Drain: asks for nothing, releases what has not begun, and waits for what has."""
        self.draining = True
        self._hurry.set()
        self._tally.idle.set(IdleReason.DRAINING, True)
        self.pause(True)
        waiting = [lease_id for lease_id in self._tasks if lease_id not in self._started]
        for lease_id in waiting:
            self._tasks[lease_id].cancel()
        if waiting:
            await self._release(waiting, "drain")
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    def _begin(self, tasks: asyncio.TaskGroup, lease: Lease) -> None:
        if lease.lease_id in self._tasks:
            return
        task = tasks.create_task(self._work(lease), name=f"lease {lease.lease_id}")
        self._tasks[lease.lease_id] = task
        task.add_done_callback(lambda _: self._end(lease))

    def _end(self, lease: Lease) -> None:
        self._tasks.pop(lease.lease_id, None)
        self._started.discard(lease.lease_id)
        self._room.set()

    async def _work(self, lease: Lease) -> None:
        """One lease, to its end."""
        try:
            seq = await self._make_group(lease)
            self._spooled[seq] = lease.lease_id
            self._failing.reset()
        except _GivenUp as outcome:
            self._tally.dropped[outcome.reason] += 1
            _log.warning("group_dropped", reason=outcome.reason, prompt_id=lease.prompt.prompt_id, detail=str(outcome))
            if outcome.reason in _OUR_FAULTS:
                await self._failing.wait(self._hurry)
            await self._release([lease.lease_id], outcome.reason)

    async def _make_group(self, lease: Lease) -> int:
        """The seq of the spooled group. Raises _GivenUp."""
        token_ids = self._prompts.render(lease.prompt.text)
        # What fills the context no engine can answer: it would refuse it again and again.
        longest = min(self._session.settings.max_prompt_tokens, self._engine.context_tokens - 1)
        if len(token_ids) > longest:
            raise _GivenUp("prompt_too_long", f"{len(token_ids)} tokens, at most {longest}")
        with self._tally.idle.held_up_by(IdleReason.WAITING_FOR_WEIGHTS):
            await self._follower.reached(lease.min_policy_version)
        async with self._generating:
            with self._tally.idle.held_up_by(IdleReason.SPOOL_FULL):
                await self._spool.room.wait()
            self._started.add(lease.lease_id)
            sampling = self._sampling(lease)  # now: the session may be renewed meanwhile, with other settings
            generated = await self._generate(lease, token_ids, sampling)
        with self._tally.idle.held_up_by(IdleReason.SCORING):
            async with self._scoring:
                scores = await self._score(lease, generated)
        payload = encode_group(_scored_group(lease, token_ids, generated, scores, sampling.temperature))
        if len(payload) > _PAYLOAD_BYTES:
            raise _GivenUp("generation_failed", f"a group of {len(payload)} bytes does not fit a message")
        await self._delay()
        failpoints.hit("rollout.before_spool")
        seq = await self._spool.append(payload)
        self._tally.groups += 1
        return seq

    async def _delay(self) -> None:
        """Waits as [delay] rollouts says; a drain ends it. Before the spool, since the spool is sent in order: there a
        late group would hold up all behind it."""
        if (wait_s := self._delays.next_s()) <= 0.0:
            return
        self._delayed += 1
        self._room.set()
        try:
            await set_within(self._hurry, wait_s)
        finally:
            self._delayed -= 1

    async def _generate(self, lease: Lease, token_ids: tuple[int, ...], sampling: SamplingSettings) -> Generated:
        request = GenerateRequest(
            prompt_token_ids=token_ids, completions=lease.group_size, sampling=sampling, seed=lease.seed
        )
        failure = ""
        with self._tally.idle.generating():
            for _ in range(_GENERATE_ATTEMPTS):
                try:
                    generated = await self._engine.generate(request)
                except EngineError as error:
                    failure = str(error)
                    continue
                if not all(math.isfinite(logprob) for drawn in generated.completions for logprob in drawn.logprobs):
                    version = generated.policy_version  # weights are finite, what they compute need not be
                    raise _GivenUp("generation_failed", f"policy version {version} gives log-probs that are not finite")
                self._tally.generated(sum(len(d.token_ids) for d in generated.completions), generated.seconds)
                return generated
        raise _GivenUp("generation_failed", failure)

    async def _score(self, lease: Lease, generated: Generated) -> GroupScores:
        texts = [self._prompts.decode(drawn.token_ids) for drawn in generated.completions]
        try:
            scores = await self._scorer.score(lease.prompt, texts)
        except ScoreError as error:
            raise _GivenUp("bad_gold", str(error)) from error
        except EngineError as error:
            raise _GivenUp("scoring_failed", str(error)) from error
        self._tally.scored(scores.seconds)
        return scores

    def _sampling(self, lease: Lease) -> SamplingSettings:
        settings = self._session.settings
        return settings.eval_sampling if lease.purpose is LeasePurpose.EVAL else settings.sampling

    async def _lease(self, count: int) -> list[Lease]:
        """Possibly none. Raises what LearnerSession.call raises."""
        response = await self._session.call(
            lambda session: self._control.LeasePrompts(
                control_pb2.LeasePromptsRequest(
                    session=to_session(session),
                    max_leases=count,
                    wait_ms=_LEASE_WAIT_MS,
                    policy_version=self._follower.version,
                ),
                timeout=_LEASE_TIMEOUT_S,
            )
        )
        if response.reason in _ASK_WHY and response.reason != self._no_leases:
            self._news.set()
        self._no_leases = response.reason
        return [from_lease(message) for message in response.leases]

    async def _release(self, lease_ids: Sequence[str], reason: str) -> None:
        """Saves the learner the time that a lease takes to expire; nothing depends on it."""
        try:
            await self._session.call(
                lambda session: self._control.ReleaseLeases(
                    control_pb2.ReleaseLeasesRequest(session=to_session(session), lease_ids=lease_ids, reason=reason),
                    timeout=_RELEASE_TIMEOUT_S,
                )
            )
        except (UnavailableError, ExhaustedError) as error:
            _log.info("release_failed", error=error, leases=len(lease_ids))


def _scored_group(
    lease: Lease, token_ids: tuple[int, ...], generated: Generated, scores: GroupScores, temperature: float
) -> ScoredGroup:
    completions = tuple(
        Completion(
            token_ids=drawn.token_ids,
            sampler_logprobs=drawn.logprobs,
            reward=score.reward,
            finish_reason=drawn.finish_reason,
            version_spans=drawn.version_spans,
            grader_scores={part.grader: part.reward for part in score.parts},
        )
        for drawn, score in zip(generated.completions, scores.scores, strict=True)
    )
    return ScoredGroup(
        lease_id=lease.lease_id,
        prompt_id=lease.prompt.prompt_id,
        purpose=lease.purpose,
        policy_version=generated.policy_version,
        policy_root=generated.policy_root,
        prompt_token_ids=token_ids,
        completions=completions,
        generation_s=generated.seconds,
        scoring_s=scores.seconds,
        temperature=temperature,
        seed=lease.seed,
        eval_round=lease.eval_round,
    )


def limits_for(*, leases: int, max_batch_rows: int, group_size: int) -> RolloutLimits:
    """`leases` 0 takes two engine batches. The engine holds half a batch more than it can run, so that rows which end
    are followed at once."""
    batch = max(1, -(-max_batch_rows // group_size))
    return RolloutLimits(leases=leases or 2 * batch, generating=batch + max(1, batch // 2), scoring=max(2, batch // 2))

"""The pool: grades completions in workers that it may kill, so that no answer can hang, crash or fill this process.

    score_group ──chunks──► idle worker ──frames──► one reply per completion
                              │ no reply in time, dead, out of memory
                              ▼
                            killed and replaced; the completion at fault is 0 (its own fault) or tried once more (ours)

Whose fault it was is decided by CPU time: a worker that was killed while it computed had spent the answer's budget; one
that hung without computing, crashed or was killed by someone else failed itself, and that is never a reward of 0.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from services.reward.graders import Permissions, WeightedGrader, build
from services.reward.graders.python_callable import PythonGrader
from services.reward.scorer import Part, Score, ScoreRequest, Status
from services.reward.spec import GraderSpec, as_json
from services.reward.worker import Limits
from services.reward.worker_handle import Fault, FaultKind, Nursery, WorkerHandle
from services.runtime.errors import EngineError, ScoreError
from services.wire.types import MOST_REWARD

CHUNK_MAX = 8
TRIES = 2
# A worker that dies with its nursery says nothing about the completion that it held.
NURSERY_TRIES = 5


@dataclass(slots=True, kw_only=True)
class PoolStats:
    """Counts since the pool was opened."""

    scored: int = 0
    answer_timeouts: int = 0
    infrastructure_failures: int = 0
    restarts: int = 0
    """Workers replaced for any reason, ends of their term included."""


class Pool:
    """Fills the seam Scorer: `async with Pool(workers=2) as pool: await pool.score_group(requests, graders)`."""

    def __init__(
        self, *, workers: int = 2, limits: Limits | None = None, permissions: Permissions | None = None
    ) -> None:
        self._workers = workers
        self._limits = limits or Limits()
        self._permissions = permissions or Permissions()
        self._idle: asyncio.Queue[WorkerHandle | None] = asyncio.Queue()
        self._nursery: Nursery | None = None
        self._starting = asyncio.Lock()
        self._replacing: set[asyncio.Task[None]] = set()
        self._broken: EngineError | None = None
        self.stats = PoolStats()

    @property
    def limits(self) -> Limits:
        return self._limits

    async def __aenter__(self) -> Self:
        try:
            for _ in range(self._workers):
                self._idle.put_nowait(await self._fresh())
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        for task in self._replacing:
            task.cancel()
        await asyncio.gather(*self._replacing, return_exceptions=True)
        while not self._idle.empty():
            worker = self._idle.get_nowait()
            if worker is not None:
                worker.kill()
        if self._nursery is not None:
            await self._nursery.close()

    @property
    def workers(self) -> int:
        """Grader processes."""
        return self._workers

    @property
    def nursery_pid(self) -> int | None:
        """Process that forks the workers; None before the pool is opened."""
        return None if self._nursery is None else self._nursery.pid

    def check(self, graders: Sequence[GraderSpec]) -> None:
        """Raises ScoreError if a grader is unknown, wrongly configured, or not allowed on this host."""
        build(graders, self._permissions)

    async def score_group(self, requests: Sequence[ScoreRequest], graders: Sequence[GraderSpec]) -> list[Score]:
        """One score for each request, in order. A hostile completion costs the others nothing but time.

        Raises ScoreError (bad grader or reference answer) and EngineError (no worker can be started, or none can import
        what a grader calls).
        """
        built = build(graders, self._permissions)
        job = _Job(
            requests=requests,
            graders=json.dumps(as_json(graders)),
            extra_s=sum(one.extra_s for one in built),
            importing=any(isinstance(one.grader, PythonGrader) for one in built),
            scores=[self._overlong(request, built) for request in requests],
        )
        open_items = [index for index, score in enumerate(job.scores) if score is None]
        size = max(1, min(CHUNK_MAX, -(-len(open_items) // self._workers)))
        chunks = [open_items[start : start + size] for start in range(0, len(open_items), size)]
        if len(chunks) == 1:
            await self._score_chunk(job, chunks[0])
        else:
            await self._score_chunks(job, chunks)
        if job.unusable is not None:
            raise ScoreError(job.unusable)
        scores = [score for score in job.scores if score is not None]
        self._count(scores)
        return scores

    async def _score_chunks(self, job: "_Job", chunks: Sequence[Sequence[int]]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for chunk in chunks:
                    tasks.create_task(self._score_chunk(job, chunk))
        except* EngineError as group:
            raise EngineError(str(group.exceptions[0])) from group

    async def _score_chunk(self, job: "_Job", chunk: Sequence[int]) -> None:
        """Consumes idle workers, waits for replies, produces `job.scores` of `chunk`; on cancel replaces its worker."""
        position = failures = nurseries = 0
        started = asyncio.get_running_loop().time()
        while position < len(chunk) and job.unusable is None:
            done, fault = await self._run(job, chunk[position:])
            position += done
            if done:
                failures = nurseries = 0
            if fault is None:
                continue
            now = asyncio.get_running_loop().time()
            seconds, started = now - started, now
            failures += fault.kind is not FaultKind.NURSERY
            nurseries += fault.kind is FaultKind.NURSERY
            if fault.kind is FaultKind.ANSWER:
                job.scores[chunk[position]] = _no_score(Status.ANSWER_TIMEOUT, fault.reason, seconds)
            elif failures >= TRIES or nurseries >= NURSERY_TRIES:
                job.scores[chunk[position]] = _no_score(Status.INFRASTRUCTURE_FAILURE, fault.reason, seconds)
            else:
                continue
            position, failures, nurseries = position + 1, 0, 0

    async def _run(self, job: "_Job", chunk: Sequence[int]) -> tuple[int, Fault | None]:
        """Grades `chunk` in one worker until a fault; how many it scored, and the fault of the next one."""
        worker = await self._idle.get()
        if worker is None:
            self._idle.put_nowait(None)
            raise self._broken or EngineError("The grader pool is closed.")
        usable, done = False, 0
        try:
            await worker.send({"graders": job.graders, "items": [job.item(index) for index in chunk]})
            fault = await worker.ready(importing=job.importing, wall_s=self._limits.wall_s)
            if fault is not None:
                return done, fault
            for index in chunk:
                reply = await worker.reply(
                    wall_s=self._limits.wall_s + job.extra_s, cpu_s=self._limits.cpu_s + job.extra_s
                )
                if isinstance(reply, Fault):
                    return done, reply
                if reply["kind"] == "unusable":
                    job.unusable = str(reply["reason"])
                    return done, None
                job.scores[index] = _score(reply)
                done += 1
            usable = worker.items < self._limits.items_per_worker
            return done, None
        finally:
            self._give_back(worker, usable)

    def _give_back(self, worker: WorkerHandle, usable: bool) -> None:
        if usable:
            self._idle.put_nowait(worker)
            return
        worker.kill()
        self.stats.restarts += 1
        task = asyncio.get_running_loop().create_task(self._replace())
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _replace(self) -> None:
        try:
            self._idle.put_nowait(await self._fresh())
        except EngineError as error:
            # Without this, callers would wait for a worker that never comes.
            self._broken = error
            self._idle.put_nowait(None)

    async def _fresh(self) -> WorkerHandle:
        async with self._starting:
            if self._nursery is None or not self._nursery.alive:
                self._nursery = await Nursery.start(self._limits, self._permissions)
            return await self._nursery.fork()

    def _overlong(self, request: ScoreRequest, built: Sequence[WeightedGrader]) -> Score | None:
        if len(request.completion) <= self._limits.completion_chars:
            return None
        reason = f"longer than {self._limits.completion_chars} characters"
        parts = tuple(
            Part(grader=one.name, reward=0.0, weight=one.weight, extracted=None, reason=reason) for one in built
        )
        return Score(reward=0.0, extracted=None, reason=reason, seconds=0.0, status=Status.OK, parts=parts)

    def _count(self, scores: Sequence[Score]) -> None:
        self.stats.scored += len(scores)
        self.stats.answer_timeouts += sum(score.status is Status.ANSWER_TIMEOUT for score in scores)
        self.stats.infrastructure_failures += sum(score.status is Status.INFRASTRUCTURE_FAILURE for score in scores)


@dataclass(slots=True, kw_only=True)
class _Job:
    """One group on its way: `scores` is filled in by the chunks; `unusable` says why no completion can be scored."""

    requests: Sequence[ScoreRequest]
    graders: str
    extra_s: float
    importing: bool
    """Whether a worker may have to import an operator's module."""
    scores: list[Score | None]
    unusable: str | None = None

    def item(self, index: int) -> dict[str, object]:
        request = self.requests[index]
        return {
            "prompt": request.prompt,
            "answer": request.answer,
            "completion": request.completion,
            "metadata": dict(request.metadata),
        }


def _no_score(status: Status, reason: str, seconds: float) -> Score:
    return Score(reward=0.0, extracted=None, reason=reason, seconds=seconds, status=status)


def _score(reply: dict[str, object]) -> Score:
    parts = tuple(Part(**part) for part in cast("list[dict[str, Any]]", reply["parts"]))
    reward, seconds = sum(part.weight * part.reward for part in parts), cast("float", reply["seconds"])
    if not all(abs(value) <= MOST_REWARD for value in (reward, *(part.reward for part in parts))):
        reason = f"a reward of {reward:g} is none: it lies between -{MOST_REWARD:g} and {MOST_REWARD:g}"
        return _no_score(Status.INFRASTRUCTURE_FAILURE, reason, seconds)
    return Score(
        reward=reward,
        extracted=next((part.extracted for part in parts if part.extracted is not None), None),
        reason="; ".join(part.reason for part in parts),
        seconds=seconds,
        status=Status.OK,
        parts=parts,
    )

"""Keeps one vLLM child running on the right weights.

    submit ─► child ─► GeneratedGroup ─► future         child dies or hangs ─► next child on `held` ─► asked again
    load ───► child ─► `held` is the new version

Guarantee: whatever answers was started from `held` or took every load since. A load that fails, or that nobody waited
for, ends the child; the next one starts from `held`.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from services.runtime.backoff import Backoff
from services.runtime.errors import ConfigError, EngineError, HeteroRLError
from services.runtime.log import get_logger
from services.sampler.vllm_child.messages import Command, Generate, GeneratedGroup, Ready, Report, Start
from services.sampler.vllm_child.process import ChildEndedError, VllmProcess
from services.sampler.vllm_child.staging import Staging
from services.wire.delta import Weights

_log = get_logger("sampler.engine")
_STOP_S = 5.0
_T = TypeVar("_T")
_MOST_IDLE_DEATHS = 5
"""Children in a row that have not answered anything: another one would not either."""
_MOST_DEATHS_OF_A_GROUP = 2
"""A group that was in flight at so many deaths may be their cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Verified weights in host memory."""

    weights: Weights
    version: int
    root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSettings:
    """`arguments`: vLLM's EngineArgs. `start_s`: bound on loading. `stuck_s`: silence that counts as a hang."""

    model_dir: Path
    arguments: Mapping[str, object]
    environment: Mapping[str, str]
    in_flight: bool
    start_s: float
    stuck_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    asked: Generate
    answer: asyncio.Future[GeneratedGroup]
    deaths: int = 0


class Supervisor:
    """One child at a time. `start` first, `close` last; nothing may be called after `close`."""

    def __init__(self, settings: ChildSettings, staging: Staging, held: Held) -> None:
        self._settings = settings
        self._staging = staging
        self._held = held
        self._jobs: dict[int, _Job] = {}
        self._load: tuple[asyncio.Future[float], Held] | None = None
        self._process: VllmProcess | None = None
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._idle_deaths = 0
        self.restarts = 0
        self.failure: HeteroRLError | None = None
        """Why nothing will be answered any more."""

    @property
    def held(self) -> Held:
        return self._held

    @property
    def pid(self) -> int | None:
        """Of the child that runs now."""
        return None if self._process is None else self._process.pid

    async def start(self) -> Ready:
        """The first child. Raises ConfigError, EngineError, StorageError."""
        try:
            self._process, ready = await self._spawn()
        except ChildEndedError as ended:
            raise EngineError(f"vLLM {ended} while it loaded the model: see its messages above") from None
        self._up.set()
        self._task = asyncio.create_task(self._supervise(), name="vllm")
        self._task.add_done_callback(self._note_end)
        return ready

    async def submit(self, asked: Generate) -> GeneratedGroup:
        """Cancelling frees the group's sequences. Raises EngineError, or `failure`."""
        self._raise_failure()
        job = _Job(asked=asked, answer=asyncio.get_running_loop().create_future())
        self._jobs[asked["id"]] = job
        self._send(asked)
        try:
            return await job.answer
        finally:
            if self._jobs.pop(asked["id"], None) is not None:
                self._send({"kind": "cancel", "id": asked["id"]})

    async def load(self, path: str, held: Held) -> float:
        """Seconds that generation stood still. One call at a time. `path`: what differs from `held`; empty is nothing.

        A child that dies meanwhile may have been killed for other reasons: its successor is asked once more. Raises
        EngineError when that one dies too or vLLM reports an error: the old version serves on.
        """
        try:
            return await self._load_once(path, held)
        except ChildEndedError as ended:
            _log.warning("load_repeated", version=held.version, why=str(ended))
        try:
            return await self._load_once(path, held)
        except ChildEndedError as ended:
            raise EngineError(f"the engine {ended} during a load, as before: the old version serves on") from None

    async def _load_once(self, path: str, held: Held) -> float:
        await self._up.wait()
        self._raise_failure()
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._load = (answer, held)
        self._send({"kind": "load", "path": path, "version": held.version, "root": held.root})
        try:
            return await answer
        except asyncio.CancelledError:
            if self._process is not None:
                self._process.kill()  # it may have taken the load or not
            raise
        finally:
            self._load = None
            self._mark_due()

    async def close(self) -> None:
        self._fail(EngineError("the engine was closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        if self._process is not None:
            await self._process.close(_STOP_S)
            self._process = None

    async def _spawn(self) -> tuple[VllmProcess, Ready]:
        """A child that has loaded `held`. Raises ConfigError, EngineError, StorageError, ChildEndedError."""
        settings, held = self._settings, self._held
        folder = await asyncio.to_thread(self._staging.model_dir, settings.model_dir, held.weights)
        process = await VllmProcess.spawn(settings.environment, settings.stuck_s)
        try:
            process.send(
                Start(
                    kind="start",
                    model_dir=str(folder),
                    arguments=dict(settings.arguments),
                    version=held.version,
                    root=held.root,
                    in_flight=settings.in_flight,
                )
            )
            async with asyncio.timeout(settings.start_s):
                report = await process.receive()
            if report["kind"] == "ready":
                return process, report
        except TimeoutError:
            await process.close(0)
            raise EngineError(f"vLLM was not ready after {settings.start_s:g} s: see its messages above") from None
        except BaseException:
            await process.close(0)
            raise
        finally:
            self._staging.drop_model_weights()
        await process.close(_STOP_S)
        if report["kind"] != "refused":
            raise EngineError(f"vLLM began with {report['kind']}: the two sides are of different versions")
        if report["fault"] == "config":
            raise ConfigError(f"vLLM refuses the model or a setting of [engine]: {report['message']}")
        raise EngineError(f"vLLM cannot load the model: {report['message']}")

    async def _supervise(self) -> None:
        """Until it gives up or is cancelled: serves from a child, and from the next when one ends."""
        while self._process is not None:
            how = await self._serve(self._process)
            self._process = None
            self._up.clear()
            self.restarts += 1
            self._idle_deaths += 1
            _log.error("engine_died", how=how, groups=len(self._jobs), restarts=self.restarts)
            self._note_death(how)
            await self._restart(how)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """A fault of ours must not leave callers waiting."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("supervision_failed", exc_info=error)
            self._fail(EngineError(f"the supervision of vLLM failed: {error}"))

    async def _serve(self, process: VllmProcess) -> str:
        """Passes reports on. Returns how the child ended."""
        watch = asyncio.create_task(process.watch())
        try:
            while True:
                self._take(await process.receive())
        except ChildEndedError as ended:
            return str(ended)
        finally:
            watch.cancel()

    async def _restart(self, how: str) -> None:
        """The next child, asked for everything that is unanswered; or the end, after too many in a row."""
        backoff = Backoff()
        while self._idle_deaths < _MOST_IDLE_DEATHS:
            try:
                self._process, _ = await self._spawn()
            except (ChildEndedError, HeteroRLError) as error:
                how = str(error)
                self._idle_deaths += 1
                _log.error("engine_restart_failed", why=how)
                await asyncio.sleep(backoff.next_delay_s())
                continue
            _log.info("engine_restarted", pid=self._process.pid, version=self._held.version, groups=len(self._jobs))
            for job in self._jobs.values():
                self._send(job.asked)
            self._up.set()
            return
        # A ConfigError, because another start would not help: the sampler ends and says why.
        self._fail(ConfigError(f"vLLM keeps ending ({how}): look at its messages above"))

    def _note_death(self, how: str) -> None:
        """A load that was waited for has failed; a group that has seen too many deaths is given up."""
        if self._load is not None:
            _settle(self._load[0], ChildEndedError(how))
        for job in list(self._jobs.values()):
            job.deaths += 1
            if job.deaths >= _MOST_DEATHS_OF_A_GROUP:
                del self._jobs[job.asked["id"]]
                _settle(job.answer, EngineError(f"the engine {how}, as before, with this group in flight"))

    def _fail(self, failure: HeteroRLError) -> None:
        """For good."""
        self.failure = failure
        self._up.set()
        for job in self._jobs.values():
            _settle(job.answer, failure)
        self._jobs.clear()
        if self._load is not None:
            _settle(self._load[0], failure)

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _send(self, command: Command) -> None:
        """To the child that runs; one that does not run yet is asked for all jobs when it does."""
        if self._process is not None:
            self._process.send(command)
            self._mark_due()

    def _mark_due(self) -> None:
        if self._process is not None:
            self._process.owes(bool(self._jobs) or self._load is not None)

    def _take(self, report: Report) -> None:
        if report["kind"] == "generated":
            self._idle_deaths = 0
            if (job := self._jobs.pop(report["id"], None)) is not None:
                _settle(job.answer, report)
        elif report["kind"] == "failed":
            if (job := self._jobs.pop(report["id"], None)) is not None:
                _settle(job.answer, EngineError(f"vLLM refuses a request: {report['message']}"))
        elif report["kind"] == "loaded" and self._load is not None:
            _, incoming = self._load
            self._held = incoming
            _settle(self._load[0], report["pause_s"])
        elif report["kind"] == "load_failed" and self._load is not None:
            _settle(self._load[0], EngineError(f"vLLM failed to load weights ({report['message']}): it starts anew"))
        self._mark_due()


def _settle(answer: asyncio.Future[_T], outcome: _T | HeteroRLError | ChildEndedError) -> None:
    """A caller that has gone is not an error."""
    if answer.done():
        return
    if isinstance(outcome, HeteroRLError | ChildEndedError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)

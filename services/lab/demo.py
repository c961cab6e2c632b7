"""The demo: GEPO on sums, over emulated wide-area links, with a sampler killed half way. One real process per role.

consumes  the shipped tiny policy and a generated data set
produces  OUT/summary.json, metrics.jsonl, report.html, events.log, policy/ (Hugging Face format)
on Ctrl-C the learner drains (finishes its step, exports, writes its summary), and the report is written all the same
"""

import asyncio
import contextlib
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live

from heterorl.v1 import monitor_pb2
from services.lab.demo_site import DemoSettings, Site
from services.monitor.client import MonitorClient
from services.monitor.report import write_report
from services.monitor.views import render
from services.runtime.errors import EngineError, UnavailableError

_VICTIM = "sampler-2"


@dataclass(slots=True, kw_only=True)
class Story:
    """What happened so far: the lines shown as events, and the series behind the sparklines."""

    started: float = field(default_factory=time.monotonic)
    events: list[str] = field(default_factory=list[str])
    rewards: list[float] = field(default_factory=list[float])

    def timed(self, text: str) -> str:
        """`text` behind the seconds since the start."""
        return f"{time.monotonic() - self.started:6.1f} s  {text}"

    def tell(self, text: str) -> None:
        """Adds an event."""
        self.events.append(self.timed(text))


class Demo:
    """Runs the processes of a site, watches the learner as a monitor client does, and plays the fault."""

    def __init__(self, out: Path, settings: DemoSettings, console: Console) -> None:
        self._site = Site(out=out, settings=settings)
        self._console = console
        self._story = Story()
        self._restarted = asyncio.Event()

    async def run(self) -> None:
        """The whole demo. Raises EngineError when a process fails that the demo did not kill."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupt)
        site = self._site
        try:
            self._tell("certificates, data and configuration are written")
            site.prepare()
            self._tell("the learner starts")
            await site.start_learner()
            self._tell(f"the learner listens on {site.learner_address} (mutual TLS); links, rewards and samplers start")
            await site.start_sites()
            await self._watch_to_the_end()
        finally:
            await site.stop()
        self._collect()

    def _tell(self, text: str) -> None:
        self._story.tell(text)
        if not self._console.is_terminal:
            self._console.print(self._story.events[-1], highlight=False, soft_wrap=True)

    def _interrupt(self) -> None:
        self._tell("interrupted: the learner drains, then the report is written")
        if self._site.learner is not None and self._site.learner.process.returncode is None:
            self._site.learner.process.send_signal(signal.SIGTERM)

    async def _watch_to_the_end(self) -> None:
        learner = self._site.learner
        assert learner is not None
        screen = Live(console=self._console, refresh_per_second=4, transient=False)
        with screen if self._console.is_terminal else contextlib.nullcontext():
            others = {
                asyncio.create_task(self._watch(screen)),
                asyncio.create_task(self._play_fault()),
                *(asyncio.create_task(self._guard(name)) for name in self._site.samplers),
            }
            learner_end = asyncio.create_task(learner.exited())
            try:
                await _first_failure_or(learner_end, others)
            finally:
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
        code = await learner_end
        if code != 0:
            raise EngineError(f"the learner ended with exit code {code}:\n{learner.last_lines()}")
        self._tell("the learner has ended")

    async def _watch(self, screen: Live) -> None:
        """Follows WatchStatus and draws. Ends with the learner: its stream then fails, which is no error here."""
        last_step = 0
        with contextlib.suppress(UnavailableError):
            async with MonitorClient(self._site.learner_address, self._site.tls("monitor")) as client:
                async for status in client.watch(interval_ms=250):
                    if status.step > last_step:
                        self._story.rewards.append(status.metrics.get("reward_mean", 0.0))
                        if not self._console.is_terminal and status.step // 10 > last_step // 10:
                            self._console.print(self._story.timed(_line(status)), highlight=False, soft_wrap=True)
                        last_step = status.step
                    screen.update(render(status, self._story.rewards, self._story.events[-8:]))

    async def _guard(self, name: str) -> None:
        """Raises EngineError when a sampler ends that was neither killed by us nor told to go. Follows its restarts."""
        while True:
            child = self._site.samplers[name]
            code = await child.exited()
            if code not in (0, -signal.SIGKILL):
                raise EngineError(f"{name} ended with exit code {code}:\n{child.last_lines()}")
            await self._restarted.wait()
            if self._site.samplers[name] is child:
                return

    async def _play_fault(self) -> None:
        """SIGKILL to one sampler half way, then a new process on its old state, as a service manager would start it."""
        half = self._site.settings.steps // 2
        with contextlib.suppress(UnavailableError):
            async with MonitorClient(self._site.learner_address, self._site.tls("monitor")) as client:
                async for status in client.watch(interval_ms=250):
                    if status.step >= half:
                        break
                else:
                    return  # interrupted before
            victim = self._site.samplers[_VICTIM]
            self._tell(f"SIGKILL to {_VICTIM} at step {status.step}")
            victim.kill()
            await victim.exited()
            await self._site.start_sampler(_VICTIM)
            self._restarted.set()
            self._tell(f"{_VICTIM} starts again on the spool and the weights that it had")

    def _collect(self) -> None:
        """Copies what the learner wrote to where people look for it, and writes the report."""
        out = self._site.out
        for name in ("summary.json", "metrics.jsonl"):
            source = self._site.learner_state / name
            if not source.exists():
                raise EngineError(f"the learner wrote no {name}: see {self._site.work / 'logs'}")
            shutil.copyfile(source, out / name)
        (out / "events.log").write_text("\n".join(self._story.events) + "\n", encoding="utf-8")
        write_report(out)


async def _first_failure_or(end: asyncio.Task[int], others: set[asyncio.Task[None]]) -> None:
    """Waits for `end`, and raises what any of the others raises before."""
    waiting: set[asyncio.Task[int] | asyncio.Task[None]] = {end, *others}
    while not end.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


def _line(status: monitor_pb2.RunStatus) -> str:
    accuracy = f", held-out {status.evals[-1].accuracy:.1%}" if status.evals else ""
    return (
        f"step {status.step}/{status.steps_total}: "
        f"reward {status.metrics.get('reward_mean', 0.0):.3f}{accuracy}, "
        f"staleness ≤ {max(status.staleness_histogram, default=0)}, idle {status.idle_share:.0%}"
    )

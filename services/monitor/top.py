"""The live terminal view: follows WatchStatus, and comes back when the learner does."""

import asyncio
import sys
from collections.abc import Callable
from contextlib import ExitStack

from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from services.monitor import views
from services.monitor.client import MonitorClient
from services.monitor.why import findings
from services.runtime.backoff import Backoff
from services.runtime.errors import UnavailableError
from services.wire.tls import TlsFiles


async def watch(target: str, tls: TlsFiles | None, interval_s: float, *, as_json: bool) -> None:
    """Draws until the run ends; where that cannot be (a pipe, TERM=dumb), prints one view below the other. A learner
    that goes away is shown as such, and waited for.

    Raises UnavailableError when the learner does not answer the first time.
    """
    console = views.console()
    drawn = not as_json and sys.stdout.isatty() and not console.is_dumb_terminal
    backoff, never = Backoff(), asyncio.Event()
    rewards: list[float] = []
    last_step = 0
    async with MonitorClient(target, tls) as client:
        await client.status()
        with ExitStack() as stack:
            show: Callable[[RenderableType], None] = console.print
            if drawn:
                show = stack.enter_context(Live(console=console, refresh_per_second=4, screen=True)).update
            while True:
                try:
                    async for status in client.watch(int(interval_s * 1000)):
                        backoff.reset()
                        if as_json:
                            print(views.as_json(status, indent=None), flush=True)
                            continue
                        if status.step > last_step:
                            rewards.append(status.metrics.get("reward_mean", 0.0))
                            last_step = status.step
                        show(views.render(status, rewards, findings(status)))
                    return
                except UnavailableError:
                    if not as_json:
                        show(Text(f"{target} does not answer: trying again"))
                    await backoff.wait(never)

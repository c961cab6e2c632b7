"""The live terminal view: follows WatchStatus, and comes back when the learner does."""

import asyncio
from contextlib import ExitStack

from rich.console import Console
from rich.live import Live
from rich.text import Text

from services.monitor import views
from services.monitor.client import MonitorClient
from services.monitor.why import findings
from services.runtime.backoff import Backoff
from services.runtime.errors import UnavailableError
from services.wire.tls import TlsFiles


async def watch(target: str, tls: TlsFiles | None, interval_s: float, *, as_json: bool) -> None:
    """Draws until the run ends. A learner that goes away is shown as such, and waited for.

    Raises UnavailableError when the learner does not answer the first time.
    """
    console = Console()
    backoff, never = Backoff(), asyncio.Event()
    rewards: list[float] = []
    last_step = 0
    async with MonitorClient(target, tls) as client:
        await client.status()
        with ExitStack() as stack:
            screen: Live | None = None
            if not as_json:  # beside a Live on a terminal, rich would fold what is printed at its width
                screen = stack.enter_context(Live(console=console, refresh_per_second=4, screen=console.is_terminal))
            while True:
                try:
                    async for status in client.watch(int(interval_s * 1000)):
                        backoff.reset()
                        if screen is None:
                            print(views.as_json(status, indent=None), flush=True)
                            continue
                        if status.step > last_step:
                            rewards.append(status.metrics.get("reward_mean", 0.0))
                            last_step = status.step
                        screen.update(views.render(status, rewards, findings(status)))
                    return
                except UnavailableError:
                    if screen is not None:
                        screen.update(Text(f"{target} does not answer: trying again"))
                    await backoff.wait(never)

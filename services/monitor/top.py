"""The live terminal view: follows WatchStatus, and comes back when the learner does."""

import asyncio

from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.live import Live

from services.monitor.client import MonitorClient
from services.monitor.views import render
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
        with Live(console=console, refresh_per_second=4, screen=console.is_terminal and not as_json) as screen:
            while True:
                try:
                    async for status in client.watch(int(interval_s * 1000)):
                        backoff.reset()
                        if as_json:
                            print(MessageToJson(status, preserving_proto_field_name=True, indent=None), flush=True)
                            continue
                        if status.step > last_step:
                            rewards.append(status.metrics.get("reward_mean", 0.0))
                            last_step = status.step
                        screen.update(render(status, rewards, findings(status)))
                    return
                except UnavailableError:
                    screen.update(f"{target} does not answer: trying again")
                    await backoff.wait(never)

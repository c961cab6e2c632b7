"""The local reward service as a child process: started, restarted when it dies, ended with the sampler."""

import asyncio
import os
import sys
from pathlib import Path

from services.runtime.backoff import Backoff
from services.runtime.errors import EngineError
from services.runtime.log import get_logger
from services.sampler.config import RewardSection
from services.sampler.tally import Tally

_log = get_logger("sampler.reward")
_STOP_S = 5.0
_STEADY_S = 30.0
_MOST_EARLY_DEATHS = 5


class RewardChild:
    """`socket` is where it listens. Groups that are being scored when it dies are scored again."""

    def __init__(self, *, socket: Path, settings: RewardSection, tally: Tally) -> None:
        self._socket = socket
        self._settings = settings
        self._tally = tally
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"unix://{self._socket.absolute()}"

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Starts it; it listens a moment later."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.sampler.tied_process",
            str(os.getpid()),
            "services.cli",
            *("reward", "serve", "--listen", self.address, "--workers", str(self._settings.workers)),
            *(["--allow-code=isolated"] if self._settings.allow_code else []),
            *(f"--allow-python={module}" for module in self._settings.allow_python),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the sampler: groups in flight are still to be scored
        )
        _log.info("reward_started", pid=self._process.pid, address=self.address)

    async def supervise(self) -> None:
        """For ever. Raises EngineError when it dies again and again within seconds of its start."""
        backoff, early_deaths = Backoff(), 0
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None, "start it first"
            started = loop.time()
            code = await self._process.wait()
            steady = loop.time() - started > _STEADY_S
            early_deaths = 0 if steady else early_deaths + 1
            if steady:
                backoff.reset()
            if early_deaths >= _MOST_EARLY_DEATHS:
                raise EngineError(f"the reward service ends at once (exit code {code}): see its messages above")
            self._tally.reward_restarts += 1
            wait_s = backoff.next_delay_s()
            _log.error("reward_died", exit_code=code, retry_s=round(wait_s, 2))
            await asyncio.sleep(wait_s)
            await self.start()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after five seconds."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

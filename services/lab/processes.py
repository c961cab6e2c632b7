"""Real processes for the demo and the experiments: started in a session of their own, logged to a file, ended by us."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import EngineError

# The whole demo shares a few cores: one compute thread for each process.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(slots=True, kw_only=True)
class Child:
    """A running process and where it writes."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    async def exited(self) -> int:
        """Waits for its end; the exit code, negative for a signal."""
        return await self.process.wait()

    async def stop(self, grace_s: float = 10.0) -> int:
        """SIGTERM, then SIGKILL to its whole session after grace_s."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), grace_s)
            except TimeoutError:
                self.kill()
        return await self.process.wait()

    def kill(self) -> None:
        """SIGKILL to the process and what it started."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def last_lines(self, count: int = 5) -> str:
        """The end of its log, for an error message."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-count:])


async def start(name: str, module: str, arguments: Sequence[str], log_dir: Path) -> Child:
    """Runs `python -m module arguments…`; stdout and stderr are appended to log_dir/name.log."""
    log = log_dir / f"{name}.log"
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the children in order
        )
    return Child(name=name, process=process, log=log)


async def first_line(child: Child, timeout_s: float) -> str:
    """The first whole line of the child's log: how a server that took a free port says which.

    Raises EngineError when the child ends first or says nothing in time.
    """
    deadline = asyncio.get_running_loop().time() + timeout_s
    while asyncio.get_running_loop().time() < deadline:
        line, newline, _ = child.log.read_text(errors="replace").partition("\n")
        if newline:
            return line
        await _exit_or(child, 0.05)
    raise EngineError(f"{child.name} said nothing in {timeout_s:.0f} s: see {child.log}")


async def appears(path: Path, child: Child, timeout_s: float) -> None:
    """Waits for a file that the child makes. Raises EngineError when the child ends first or is late."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not path.exists():  # noqa: ASYNC240 - one stat
        if asyncio.get_running_loop().time() > deadline:
            raise EngineError(f"{child.name} did not make {path.name} in {timeout_s:.0f} s: see {child.log}")
        await _exit_or(child, 0.05)


async def _exit_or(child: Child, seconds: float) -> None:
    """Waits for the child's exit, which is an error here, at most so long: files give no event portably."""
    try:
        code = await asyncio.wait_for(asyncio.shield(child.process.wait()), seconds)
    except TimeoutError:
        return
    raise EngineError(f"{child.name} ended with exit code {code}:\n{child.last_lines()}")

"""A learner inside the test's own process: the real app, on loopback without TLS, small enough for seconds."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.learner.app import run_learner
from services.learner.config import LearnerConfig
from services.learner.preflight import preflight
from services.runtime.lifecycle import Process
from services.runtime.log import get_logger


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningLearner:
    """`process.request_drain` is what a signal does."""

    config: LearnerConfig
    address: str
    process: Process
    ended: asyncio.Task[None]


def write_sums(path: Path, count: int = 40) -> Path:
    """One-digit sums as a data set."""
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)][:count]
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in sums))
    return path


def small_config(folder: Path, policy: Path, **changes: dict[str, Any]) -> LearnerConfig:
    """Two groups of four per step; `changes` are sections that replace keys."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"id": "test", "state_dir": folder / "state", "steps": 3},
        "listen": {"address": "127.0.0.1:0", "insecure": True},
        "policy": {"path": policy, "device": "cpu"},
        "data": {"train": write_sums(folder / "train.jsonl")},
        "sampling": {"group_size": 4, "max_completion_tokens": 4},
        "eval": {"at_start": False, "at_end": False, "prompts": 4},
        "staleness": {"max_staleness": 2},
        "batch": {"groups_per_step": 2, "micro_batch_tokens": 64},
        "optimizer": {"lr": 1e-3},
        "lease": {"heartbeat_s": 1.0, "session_ttl_s": 4.0},
        "checkpoint": {"every_steps": 0},
    }
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return LearnerConfig.model_validate(tree)


@asynccontextmanager
async def running_learner(config: LearnerConfig) -> AsyncGenerator[RunningLearner]:
    """Serves while the block runs, and is drained at its end. What the app raises is raised here."""
    address_file = config.run.state_dir / "address"
    address_file.unlink(missing_ok=True)
    serving = asyncio.Event()

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            process = Process(tasks, get_logger("learner"))
            process.ready = lambda status: serving.set()  # type: ignore[method-assign]
            holder.append(process)
            await run_learner(process, config, preflight(config))

    holder: list[Process] = []
    ended = asyncio.create_task(main())
    waiting = asyncio.create_task(serving.wait())
    await asyncio.wait((ended, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if ended.done():
        ended.result()
    try:
        yield RunningLearner(config=config, address=address_file.read_text().strip(), process=holder[0], ended=ended)
    finally:
        holder[0].request_drain("the test is over")
        await ended

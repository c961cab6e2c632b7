"""A learner that is killed at any moment goes on from its last checkpoint; no group is lost or trained twice."""

import asyncio
import json
import os
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from services.learner.config import LearnerConfig
from services.runtime.config_render import render_toml
from services.runtime.errors import HeteroRLError
from tests.support.learner_in_process import small_config
from tests.support.scripted_sampler import dial

KILLED = -9


def reward(answer: str, text: str) -> float:
    return float(len(text) % 2)


class LearnerProcess:
    """`heterorl learner`, as a process of its own."""

    def __init__(self, config: LearnerConfig, folder: Path) -> None:
        self._file = folder / "run.toml"
        self._file.write_text(render_toml(LearnerConfig, config))
        self._address = config.run.state_dir / "address"

    async def start(self, failpoints: str = "") -> str:
        """Returns the address once it serves."""
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", "learner", "-c", str(self._file)),
            env={**os.environ, "HETERORL_FAILPOINTS": failpoints, "OMP_NUM_THREADS": "1"},
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode()
        assert line.startswith("learner listens on "), line
        return line.split()[-1]


async def work_until_gone(learner: LearnerProcess, address: str, folder: Path) -> int:
    """A sampler that works until its learner ends; returns the learner's exit code."""
    sampler = await dial(address, "eu-1", folder, reward)
    working = asyncio.create_task(sampler.work())
    code = await learner.process.wait()
    working.cancel()
    with suppress(asyncio.CancelledError, grpc.aio.AioRpcError, HeteroRLError, AssertionError, AttributeError):
        await working
    await sampler.close()
    return code


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "failpoint",
    [
        "step.after_mark_trained=2*off->kill",
        "publish.after_objects=3*off->kill",
        "publish.after_manifest=3*off->kill",
        "checkpoint.before_rename=1*off->kill",
    ],
)
async def test_a_killed_learner_goes_on_and_every_group_is_accounted_for(
    tmp_path: Path, policy_dir: Path, failpoint: str
) -> None:
    config = small_config(
        tmp_path,
        policy_dir,
        run={"id": "test", "state_dir": tmp_path / "state", "steps": 4},
        checkpoint={"every_steps": 1},
        lease={"heartbeat_s": 1.0, "session_ttl_s": 4.0, "ttl_s": 2.0},
    )
    learner = LearnerProcess(config, tmp_path)
    address = await learner.start(failpoint)
    assert await work_until_gone(learner, address, tmp_path / "a") == KILLED
    address = await learner.start()
    assert await work_until_gone(learner, address, tmp_path / "b") == 0
    summary = json.loads((config.run.state_dir / "summary.json").read_text())
    assert (summary["steps"], summary["final_version"]) == (4, 4)
    assert summary["groups_trained"] == 8
    assert summary["staleness_max"] <= 2
    with sqlite3.connect(config.run.state_dir / "journal.sqlite3") as journal:
        by_step = journal.execute(
            "SELECT trained_step, COUNT(*) FROM groups WHERE trained_step IS NOT NULL GROUP BY 1 ORDER BY 1"
        ).fetchall()
    journal.close()
    assert by_step == [(1, 2), (2, 2), (3, 2), (4, 2)]
    steps = [json.loads(line)["step"] for line in (config.run.state_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]

"""A learner that is killed in the middle of a run: its sampler works on, registers again by itself, and nothing of what
was acknowledged is lost or trained twice."""

import asyncio
import json
import os
import sqlite3
import sys
from asyncio.subprocess import Process
from collections import Counter
from pathlib import Path

import pytest

from services.lab import arithmetic
from tests.e2e.invariants import check_summary

POLICY = Path(__file__).parents[2] / "services" / "lab" / "assets" / "tiny-policy"
STEPS, GROUPS_PER_STEP, CHECKPOINT_EVERY = 12, 4, 4
KILLED = -9

RUN_TOML = f"""
run = {{ id = "restart", steps = {STEPS}, state_dir = "learner" }}
listen = {{ address = "127.0.0.1:0", insecure = true }}
policy = {{ path = "{POLICY}", device = "cpu" }}
data = {{ train = "train.jsonl", eval = "eval.jsonl", max_prompt_tokens = 32 }}
sampling = {{ group_size = 4, max_completion_tokens = 8 }}
eval = {{ prompts = 16 }}
reward = [{{ name = "exact" }}]
staleness = {{ max_staleness = 2 }}
batch = {{ groups_per_step = {GROUPS_PER_STEP}, recompute_logprobs = true }}
optimizer = {{ lr = 1e-4 }}
lease = {{ heartbeat_s = 1, session_ttl_s = 10, ttl_s = 20 }}
checkpoint = {{ every_steps = {CHECKPOINT_EVERY} }}
"""

pytestmark = [pytest.mark.timeout(420)]


async def start(folder: Path, name: str, *words: str, failpoints: str = "") -> Process:
    with (folder / f"{name}.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", *words),
            cwd=folder,
            stdout=asyncio.subprocess.PIPE if name == "learner" else log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HETERORL_FAILPOINTS": failpoints},
        )


async def start_learner(folder: Path, *words: str, failpoints: str = "") -> tuple[Process, str]:
    """The process and its address, once it serves."""
    learner = await start(folder, "learner", "learner", "-c", "run.toml", *words, failpoints=failpoints)
    assert learner.stdout is not None
    line = (await learner.stdout.readline()).decode()
    assert line.startswith("learner listens on "), (folder / "learner.log").read_text()[-3000:]
    return learner, line.split()[-1]


def events(folder: Path, name: str) -> list[dict[str, object]]:
    """The log of a process."""
    return [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines() if line.startswith("{")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    arithmetic.write_dataset(tmp_path / "train.jsonl", arithmetic.Split.TRAIN, 2000, 0)
    arithmetic.write_dataset(tmp_path / "eval.jsonl", arithmetic.Split.HELD_OUT, 16, 0)
    (tmp_path / "run.toml").write_text(RUN_TOML)
    return tmp_path


@pytest.mark.parametrize(
    "failpoint",
    [
        "step.after_mark_trained=5*off->kill",  # two steps after a checkpoint: steps 5 and 6 are taken again
        "journal.after_commit=9*off->kill",  # groups are durable, and their Acks never sent
    ],
)
async def test_a_sampler_outlives_the_death_of_its_learner_and_every_group_is_accounted_for(
    folder: Path, failpoint: str
) -> None:
    processes: list[Process] = []
    try:
        learner, address = await start_learner(folder, failpoints=failpoint)
        processes.append(learner)
        words = ("--connect.insecure=true", "--connect.sampler_id=eu-1", "--state_dir=sampler", "--engine.threads=1")
        sampler = await start(folder, "sampler", "sampler", "--learner", address, *words)
        processes.append(sampler)
        async with asyncio.timeout(150):
            assert await learner.wait() == KILLED
        assert sampler.returncode is None
        learner, again = await start_learner(folder, f"--listen.address={address}")
        processes.append(learner)
        assert again == address
        async with asyncio.timeout(200):
            codes = await asyncio.gather(learner.wait(), sampler.wait())
        assert codes == [0, 0], (folder / "learner.log").read_text()[-2000:] + (folder / "sampler.log").read_text()[
            -2000:
        ]
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    check_run(folder)


def check_run(folder: Path) -> None:
    """Raises AssertionError unless the whole run is accounted for, at both ends."""
    summary = json.loads((folder / "learner" / "summary.json").read_text())
    check_summary(summary, folder / "learner" / "journal.sqlite3")
    assert summary["steps"] == STEPS
    assert summary["groups_trained"] == STEPS * GROUPS_PER_STEP
    assert [sampler["id"] for sampler in summary["samplers"]] == ["eu-1"]
    assert summary["samplers"][0]["version"] == STEPS
    assert summary["samplers"][0]["root"] == summary["final_root"]
    with sqlite3.connect(folder / "learner" / "journal.sqlite3") as journal:
        per_step = journal.execute("SELECT trained_step FROM groups WHERE trained_step IS NOT NULL").fetchall()
        leases = journal.execute("SELECT lease_id FROM groups WHERE trained_step IS NOT NULL").fetchall()
    journal.close()
    assert Counter(step for (step,) in per_step) == dict.fromkeys(range(1, STEPS + 1), GROUPS_PER_STEP)
    assert len(set(leases)) == len(leases), "one prompt's lease was trained twice"
    with sqlite3.connect(folder / "sampler" / "spool.db") as spool:
        assert spool.execute("SELECT COUNT(*) FROM groups").fetchone() == (0,)
    spool.close()
    registered = [event for event in events(folder, "sampler") if event["event"] == "registered"]
    first, second = (event["learner_epoch"] for event in registered)
    assert first < second
    lines = [json.loads(line) for line in (folder / "learner" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "accuracy" in line] == [0, STEPS]
    shares = [line["recomputed_share"] for line in lines if "loss" in line]
    assert shares[0] == shares[-1] == 1.0, (
        "only groups of versions from before the restart keep the samplers' log-probs"
    )

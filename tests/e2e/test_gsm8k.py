"""Real text through the real processes: a random Qwen3 policy, a tokenizer trained on GSM8K, three optimizer steps."""

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.lab.tiny_policy import random_policy
from tests.e2e.invariants import check_summary

SHARED = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
SAMPLE = Path(__file__).parents[1] / "data" / "gsm8k_sample.jsonl"
DATA = SHARED if SHARED.exists() else SAMPLE
STEPS, GROUPS_PER_STEP, GROUP_SIZE, MAX_STALENESS = 3, 4, 4, 2

RUN_TOML = f"""
run = {{ id = "gsm8k", steps = {STEPS}, state_dir = "learner" }}
listen = {{ address = "127.0.0.1:0" }}
tls = {{ ca = "pki/ca.pem", certificate = "pki/learner.pem", key = "pki/learner-key.pem" }}
policy = {{ path = "model", device = "cpu" }}
data = {{ train = "{DATA}", eval = "{SAMPLE}" }}
sampling = {{ group_size = {GROUP_SIZE}, max_completion_tokens = 24 }}
eval = {{ prompts = 8 }}
staleness = {{ max_staleness = {MAX_STALENESS} }}
batch = {{ groups_per_step = {GROUPS_PER_STEP} }}
loss = {{ mask_overlong = false }}
optimizer = {{ lr = 1e-4 }}
lease = {{ heartbeat_s = 1 }}

[[reward]]
name = "math"

# A random policy solves nothing: a digit somewhere gives the rewards the variance that a step needs.
[[reward]]
name = "regex"
weight = 0.1
options = {{ pattern = "(?s).*[0-9].*" }}
"""


def start(folder: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "services.cli", *words], cwd=folder, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gsm8k")
    texts = [row["question"] + row["answer"] for row in map(json.loads, SAMPLE.read_text().splitlines())]
    random_policy(folder / "model", texts, 512)
    (folder / "run.toml").write_text(RUN_TOML)
    subprocess.run([sys.executable, "-m", "services.cli", "pki", "dev", "pki"], cwd=folder, check=True)
    learner = start(folder, "learner", "learner", "-c", "run.toml")
    processes = [learner]
    try:
        deadline = time.monotonic() + 120
        while not (folder / "learner" / "address").exists():
            assert learner.poll() is None, (folder / "learner.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)  # a file of another process: no event tells of it
        address = (folder / "learner" / "address").read_text().strip()
        for name in ("sampler-1", "sampler-2"):
            tls = ["--tls.ca=pki/ca.pem", f"--tls.certificate=pki/{name}.pem", f"--tls.key=pki/{name}-key.pem"]
            words = ("sampler", "--learner", address, f"--state_dir={name}", "--engine.threads=1", *tls)
            processes.append(start(folder, name, *words))
        codes = [process.wait(timeout=240) for process in processes]
        assert codes == [0, 0, 0], (folder / "learner.log").read_text()[-3000:]
        yield folder
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


pytestmark = [pytest.mark.timeout(420)]


def test_three_steps_on_gsm8k_account_for_every_group_and_version(finished_run: Path):
    summary = json.loads((finished_run / "learner" / "summary.json").read_text())
    check_summary(summary, finished_run / "learner" / "journal.sqlite3")
    assert summary["steps"] == STEPS
    assert summary["groups_trained"] == STEPS * GROUPS_PER_STEP
    assert {sampler["version"] for sampler in summary["samplers"]} == {STEPS}


def test_the_policy_changed_at_every_step_and_each_version_has_one_root(finished_run: Path):
    with sqlite3.connect(finished_run / "learner" / "journal.sqlite3") as database:
        roots = dict(database.execute("SELECT version, root FROM versions").fetchall())
    assert sorted(roots) == list(range(STEPS + 1))
    assert len(set(roots.values())) == STEPS + 1


def test_the_spools_are_empty_because_everything_was_acknowledged(finished_run: Path):
    for name in ("sampler-1", "sampler-2"):
        with sqlite3.connect(finished_run / name / "spool.db") as database:
            assert database.execute("SELECT count(*) FROM groups").fetchone() == (0,)

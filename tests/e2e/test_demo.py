"""The demo as a user runs it: real processes, mutual TLS, emulated wide-area links, one SIGKILL."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.invariants import check_summary

STEPS = 100


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "services.cli", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (out / "stdout.txt").write_text(done.stdout)
    return out


pytestmark = [pytest.mark.timeout(480)]


def test_accuracy_rises_by_thirty_points_and_every_group_is_accounted_for(demo: Path):
    summary = json.loads((demo / "summary.json").read_text())
    check_summary(summary, demo / "work" / "learner" / "journal.sqlite3")
    assert summary["steps"] == STEPS
    assert summary["loss"] == "gepo"
    assert summary["max_staleness"] == 8
    assert summary["accuracy_end"] >= summary["accuracy_start"] + 0.30
    assert 0 < summary["weights_bytes_sent"] < summary["weights_bytes_full"]
    assert summary["delta_ratio_median"] > 1


def test_the_killed_sampler_came_back_and_both_follow_the_final_version(demo: Path):
    summary = json.loads((demo / "summary.json").read_text())
    samplers = {sampler["id"]: sampler for sampler in summary["samplers"]}
    assert set(samplers) == {"sampler-1", "sampler-2"}
    assert samplers["sampler-1"]["restarts"] == 0
    assert samplers["sampler-2"]["restarts"] == 1
    assert "SIGKILL to sampler-2" in (demo / "events.log").read_text()
    assert samplers["sampler-1"]["root"] == summary["final_root"]


def test_metrics_hold_a_line_for_every_step_and_the_report_stands_alone(demo: Path):
    records = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    assert records[0]["accuracy"] == json.loads((demo / "summary.json").read_text())["accuracy_start"]
    report = (demo / "report.html").read_text()
    assert report.count("<svg") >= 6
    assert "http-equiv" not in report
    assert "<script" not in report


def test_the_exported_policy_answers_most_sums(demo: Path):
    tokenizer = AutoTokenizer.from_pretrained(demo / "policy")
    model = AutoModelForCausalLM.from_pretrained(demo / "policy")

    def answer(left: int, right: int) -> str:
        messages = [{"role": "user", "content": f"{left}+{right}="}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        output = model.generate(input_ids=inputs["input_ids"], max_new_tokens=8, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    # Nine of ten are right at the end, three of ten at the beginning.
    draws = random.Random(1)
    sums = [(draws.randint(100, 999), draws.randint(100, 999)) for _ in range(20)]
    right = sum(answer(left, right) == str(left + right) for left, right in sums)
    assert right >= 12

"""How many completions the pool grades per second, with and without hostile ones among them.

    nice -n 10 python tests/bench/bench_reward.py [--seconds 10] [--workers 1]

Groups of eight go through the pool one after another per worker, as a sampler sends them. The rate per CPU second
counts the CPU time of the pool's process and of its workers, their start left out, so it holds on a busy machine too:
it is the rate of one core. The latency of a completion is its own grading time, that of a group what a sampler waits
for; both are by the clock. JSON goes to tests/bench/results/reward.json.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import resource
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from services.reward.pool import Pool
from services.reward.scorer import ScoreRequest
from services.reward.spec import GraderSpec

RESULTS = Path(__file__).parent / "results" / "reward.json"
GROUP = 8
HOSTILE_SHARE = 0.01
# The first five meet the guard or the cap; the last three reach math-verify.
HOSTILE = (
    "\\boxed{10^{10^{10}}}",
    "\\boxed{(10^9)!}",
    "\\boxed{" + "7" * 100_000 + "}",
    "\\boxed{" + "(" * 5_000 + "7" + ")" * 5_000 + "}",
    "7 " * 5_000_000,
    "\\boxed{(x+y+z+w+1)^{9999}-x}",
    "\\boxed{" + "+".join(f"\\sqrt{{{one}}}" for one in range(2, 90)) + "}",
    "\\boxed{\\frac{(x+y)^{900}}{(x-y)^{901}}}",
)
SYMBOLIC = (
    ("2\\sqrt{2}", "\\boxed{\\sqrt{8}}", "\\boxed{\\sqrt{6}}"),
    ("(1,2]", "so $\\boxed{(1, 2]}$", "\\boxed{[1,2]}"),
    ("\\frac{x+1}{2}", "\\boxed{(x+1)/2}", "\\boxed{(x-1)/2}"),
    ("\\{1,2,3\\}", "\\boxed{3,2,1}", "\\boxed{1,2}"),
    ("x^2+2x+1", "\\boxed{(x+1)^2}", "\\boxed{(x+2)^2}"),
)
REASONING = "Then we take the next quantity and add 12 to it, which is 24 * 3 = <<24*3=72>>72 in all. " * 20


def demo(rng: random.Random) -> tuple[str, str, str]:
    """The demo's task: digits only."""
    answer = rng.randint(0, 9999)
    return str(answer), str(answer), str(answer + 1)


def words(rng: random.Random) -> tuple[str, str, str]:
    """GSM8K's length: some 350 words of reasoning, then ####."""
    answer = rng.randint(0, 99_999)
    return f"{answer:,}", f"{REASONING}\n#### {answer}", f"{REASONING}\n#### {answer + 1}"


def symbolic(rng: random.Random) -> tuple[str, str, str]:
    """Answers that math-verify compares."""
    return rng.choice(SYMBOLIC)


KINDS = {"digits": demo, "reasoning": words, "symbolic": symbolic}


def group(rng: random.Random, kind: str, hostile: float) -> list[ScoreRequest]:
    answer, right, wrong = KINDS[kind](rng)
    chosen = [rng.choice(HOSTILE) if rng.random() < hostile else rng.choice((right, wrong)) for _ in range(GROUP)]
    return [ScoreRequest(prompt="", answer=answer, completion=one) for one in chosen]


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def cpu_of_all() -> float:
    """CPU seconds of this process and of its children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def cost(kind: str, hostile: float, workers: int, seconds: float) -> dict[str, object]:
    """One row: a run, and its CPU time less that of a run without work."""
    before = cpu_of_all()
    asyncio.run(measure(kind, 0.0, workers, 0.0))
    started = cpu_of_all()
    row = asyncio.run(measure(kind, hostile, workers, seconds))
    cpu_s = cpu_of_all() - started - (started - before)
    graded = row["graded"]
    assert isinstance(graded, int)
    return {
        "completions": kind,
        "graded_per_cpu_s": round(graded / max(cpu_s, 1e-3), 1),
        "cpu_s": round(cpu_s, 2),
        **row,
    }


async def measure(kind: str, hostile: float, workers: int, seconds: float) -> dict[str, object]:
    graders = [GraderSpec(name="math")]
    async with Pool(workers=workers) as pool:
        await pool.score_group(group(random.Random(0), kind, 0.0), graders)
        item_s: list[float] = []
        group_s: list[float] = []
        started = time.perf_counter()

        async def sampler(seed: int) -> None:
            rng = random.Random(seed)
            while time.perf_counter() - started < seconds:
                requests = group(rng, kind, hostile)
                sent = time.perf_counter()
                scores = await pool.score_group(requests, graders)
                group_s.append(time.perf_counter() - sent)
                item_s.extend(score.seconds for score in scores)

        await asyncio.gather(*(sampler(seed) for seed in range(workers)))
        wall_s = time.perf_counter() - started
        stats = pool.stats
    return {
        "hostile_share": hostile,
        "graded_per_s_per_worker": round(len(item_s) / max(wall_s, 1e-9) / workers, 1),
        "item_ms": {"p50": ms(item_s, 0.5), "p99": ms(item_s, 0.99), "max": ms(item_s, 1.0)},
        "group_of_8_ms": {"p50": ms(group_s, 0.5), "p99": ms(group_s, 0.99), "max": ms(group_s, 1.0)},
        "graded": len(item_s),
        "answer_timeouts": stats.answer_timeouts,
        "infrastructure_failures": stats.infrastructure_failures,
        "worker_restarts": stats.restarts,
    }


def ms(values: Sequence[float], share: float) -> float:
    return round(1000 * percentile(values, share), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    rows = [
        cost(kind, hostile, arguments.workers, arguments.seconds) for kind in KINDS for hostile in (0.0, HOSTILE_SHARE)
    ]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    report = {
        "benchmark": "reward",
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "math_verify": version("math-verify"),
            "load_average_before": [round(one, 2) for one in load_before],
            "load_average_after": [round(one, 2) for one in os.getloadavg()],
            "niceness": os.nice(0),
        },
        "workers": arguments.workers,
        "largest_child_rss_bytes": peak * 1024,
        "results": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""How long samplers stand still because of grading: their own accounting (services/sampler/idle.py) in a real run.

    nice -n 5 python -m tests.bench.bench_idle [--groups 1500] [--engine transformers|vllm]

The demo's processes without its fault: learner, two samplers, a reward service with one worker beside each, the
grader `math`. Completions have at most 8 tokens, so that grading is as large beside generating as it can be: a group
with reasoning of hundreds of tokens takes a hundred times as long to generate, and about as long to grade. Steps are so
large that samplers never want for leases. Each sampler's Prometheus endpoint is read until the learner ends.
`scoring` is time in which no group was in the engine and every lease that the sampler may hold was at the graders.
"""

import argparse
import asyncio
import json
import os
import tempfile
import urllib.request
from pathlib import Path

from services.lab.demo_site import DemoSettings, Link, Site

RESULTS = Path(__file__).parent / "results" / "idle.json"
_IDLE = 'heterorl_sampler_idle_seconds_total{reason="'
_COUNTERS = ("groups_scored", "generated_tokens", "generation_seconds", "scoring_seconds")


def scrape(address: str) -> dict[str, float]:
    """Idle seconds by reason, and some counters."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name.startswith(_IDLE):
            reason = name.removeprefix(_IDLE).rstrip('"}')
            found[f"idle_{reason}"] = float(value)
        elif (counter := name.removeprefix("heterorl_sampler_").removesuffix("_total")) in _COUNTERS:
            found[counter] = float(value)
    return found


async def run(groups: int, engine: str, folder: Path) -> dict[str, object]:
    quick = Link(rtt_ms=10, rate_mbit_s=1000)
    settings = DemoSettings(
        steps=2,
        groups_per_step=groups,
        engine="vllm" if engine == "vllm" else "transformers",
        links=(quick, quick),
        grader="math",
    )
    site = Site(out=folder, settings=settings)
    site.prepare()
    last: dict[str, dict[str, float]] = {}
    first: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    worked: dict[str, float] = {}
    try:
        await site.start_learner()
        assert site.learner is not None
        await site.start_sites()
        ended = asyncio.ensure_future(site.learner.exited())
        while not ended.done():
            await asyncio.wait((ended,), timeout=0.5)
            for name in site.samplers:
                try:
                    address = (site.work / name / "metrics_address").read_text().strip()
                    values = await asyncio.to_thread(scrape, address)
                except OSError:  # not up yet, or drained
                    continue
                if values.get("groups_scored"):
                    first.setdefault(name, loop.time())
                    worked[name] = loop.time() - first[name]
                    last[name] = values
        if await ended != 0:
            raise SystemExit(site.learner.last_lines())
    finally:
        await site.stop()
    summary = json.loads((site.learner_state / "summary.json").read_text())
    return {
        "engine": engine,
        "groups_trained": summary["groups_trained"],
        "samplers": {
            name: {
                "seconds_since_first_group": round(worked[name], 2),
                "scoring_share_of_it": round(values.get("idle_scoring", 0.0) / max(worked[name], 1e-9), 6),
                **{key: round(value, 4) for key, value in sorted(values.items())},
            }
            for name, values in sorted(last.items())
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--groups", type=int, default=1500, help="groups of a step")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(run(arguments.groups, arguments.engine, Path(folder)))
    machine = {"cpus": os.cpu_count(), "load_average_before": load, "load_average_after": os.getloadavg()}
    text = json.dumps({"benchmark": "idle", "machine": machine, **result}, indent=1) + "\n"
    arguments.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()

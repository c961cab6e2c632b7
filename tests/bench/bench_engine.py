"""The vLLM engine: what a weight swap costs, and generation against bare `LLM.generate` on the same prompts.

    python -m tests.bench.bench_engine --out tests/bench/results/engine.json [--rounds N] [--swaps N]
    python -m tests.bench.bench_engine --device cuda --sizes 1.7b --out FILE      (not yet run on a GPU)

Runs in the vLLM environment (make setup-vllm). Bare vLLM lives in a process of its own and the two take turns, so that
what else runs on the machine meets both. `wall` is by the clock; `cpu` is tokens per CPU second of the process that
vLLM runs in, which other work disturbs less. Bare vLLM generates once as `LLM.generate` does by itself (`bare`) and
once with seeds (`bare_seeded`), as the engine must so that a lost group can be made again.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from services.lab.tiny_policy import PolicyShape, random_policy
from services.sampler.config import EngineSection, VllmSection
from services.sampler.engine import GenerateRequest
from services.sampler.engine_vllm import VllmEngine
from services.sampler.vllm_child.arguments import engine_arguments, environment
from services.wire.delta import BitTensor, read_weights, root_of
from services.wire.types import SamplingSettings
from tests.bench.machine import machine

PROMPTS, GROUP, TOKENS, ROWS = 16, 8, 128, 128
SHAPES = {
    "1m": PolicyShape(hidden_size=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp_size=384, context_tokens=1024),
    "86m": PolicyShape(
        hidden_size=768, layers=12, heads=12, kv_heads=4, head_dim=64, mlp_size=2048, context_tokens=1024
    ),
    "1.7b": PolicyShape(
        hidden_size=2048, layers=28, heads=16, kv_heads=8, head_dim=128, mlp_size=6144, context_tokens=1024
    ),
}
CPU_SIZES = ("1m", "86m")
TEXT = ["What is the sum of all numbers that are below one thousand and divisible by three or by five?"] * 50
Policy = Mapping[str, BitTensor]


def section(swap: str, device: str) -> EngineSection:
    on_cpu = device == "cpu"
    vllm = VllmSection.model_validate({"swap": swap, "kv_cache_gb": 1.0 if on_cpu else 8.0})
    return EngineSection(
        kind="vllm",
        device=device,
        dtype="float32" if on_cpu else "bfloat16",
        max_batch_rows=ROWS,
        threads=1 if on_cpu else 0,
        vllm=vllm,
    )


def prompts() -> list[list[int]]:
    numbers = random.Random(5)
    return [[numbers.randrange(3, 300) for _ in range(numbers.randrange(20, 60))] for _ in range(PROMPTS)]


def requests(round_: int) -> list[GenerateRequest]:
    sampling = SamplingSettings(temperature=1.0, max_completion_tokens=TOKENS)
    return [
        GenerateRequest(prompt_token_ids=tuple(prompt), completions=GROUP, sampling=sampling, seed=100 * round_ + index)
        for index, prompt in enumerate(prompts())
    ]


def bare(model_dir: str, device: str) -> None:
    """The other process: `LLM.generate` once per line on stdin, one JSON line each."""
    sys.modules["grpc"] = None
    from vllm import LLM, SamplingParams

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = engine_arguments(section("between_groups", device), device)
    llm = LLM(model=model_dir, **arguments)
    params = SamplingParams(n=GROUP, temperature=1.0, max_tokens=TOKENS, logprobs=0, detokenize=False)
    seeded = params.clone()
    seeded.seed = 0
    print("{}", file=answers, flush=True)
    for asked in sys.stdin:
        chosen = seeded if asked.strip() == "bare_seeded" else params
        seeded.seed += 1000
        started, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], chosen, use_tqdm=False)
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        spent = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, "tokens": tokens}
        print(json.dumps(spent), file=answers, flush=True)
    os._exit(0)


async def measure(engine: VllmEngine, round_: int) -> dict[str, float]:
    child = psutil.Process(engine.child_pid)
    before = sum(child.cpu_times()[:2])
    started = time.perf_counter()
    groups = await asyncio.gather(*(engine.generate(request) for request in requests(round_)))
    wall_s = time.perf_counter() - started
    tokens = sum(len(drawn.token_ids) for group in groups for drawn in group.completions)
    return {"wall_s": wall_s, "cpu_s": sum(child.cpu_times()[:2]) - before, "tokens": tokens}


def speed(rounds: list[dict[str, float]], clock: str) -> dict[str, float]:
    """Tokens per second: of the median and of the best round."""
    rates = [_rate(spent, clock) for spent in rounds]
    return {"median": statistics.median(rates), "best": max(rates)}


def _rate(spent: dict[str, float], clock: str) -> float:
    return spent["tokens"] / spent[clock]


async def compare(model_dir: Path, weights: Policy, folder: Path, *, device: str, rounds: int) -> dict[str, object]:
    settings = section("between_groups", device)
    environ = environment(settings, folder, os.environ)
    command = [sys.executable, "-m", "tests.bench.bench_engine", "--bare", str(model_dir), "--device", device]
    pipe = asyncio.subprocess.PIPE
    other = await asyncio.create_subprocess_exec(*command, env=environ, stdin=pipe, stdout=pipe)
    assert other.stdin is not None
    assert other.stdout is not None
    await other.stdout.readline()
    engine = VllmEngine(settings, folder)
    await engine.start(model_dir, weights, 0, root_of(weights))
    spent: dict[str, list[dict[str, float]]] = {"bare": [], "bare_seeded": [], "engine": []}
    for round_ in range(rounds + 1):
        for how in ("bare", "bare_seeded"):
            other.stdin.write(f"{how}\n".encode())
            spent[how].append(json.loads(await other.stdout.readline()))
        spent["engine"].append(await measure(engine, round_))
        print(f"round {round_}: { {how: done[-1] for how, done in spent.items()} }", file=sys.stderr, flush=True)
    await engine.close()
    other.stdin.close()
    await other.wait()
    result: dict[str, object] = {"completions": PROMPTS * GROUP, "tokens": TOKENS, "rounds": rounds}
    for clock in ("wall_s", "cpu_s"):
        rates = {how: speed(done[1:], clock) for how, done in spent.items()}
        shares = {
            f"median_share_of_{how}": statistics.median(
                _rate(ours, clock) / _rate(theirs, clock)
                for ours, theirs in zip(spent["engine"][1:], spent[how][1:], strict=True)
            )
            for how in ("bare", "bare_seeded")
        }
        result[clock.removesuffix("_s")] = {**rates, **shares}
    return result


def stepped(weights: Policy, version: int, names: str = "") -> Policy:
    """Other weights, as a training step makes them: the lowest bit of each tensor's first elements flips."""
    new: dict[str, BitTensor] = {}
    for name, tensor in weights.items():
        bits = tensor.bits
        if names in name:
            bits = bits.copy()
            bits[: max(1, bits.size // 50)] ^= 1 + version % 2
        new[name] = BitTensor(dtype=tensor.dtype, shape=tensor.shape, bits=bits)
    return new


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50_ms": 1000 * statistics.median(ordered),
        "p95_ms": 1000 * ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
        "max_ms": 1000 * ordered[-1],
    }


async def swaps(
    model_dir: Path, weights: Policy, folder: Path, *, device: str, swap: str, names: str, count: int
) -> dict[str, object]:
    """Swaps while the engine is kept full, and tokens per second without swaps before and after."""
    engine = VllmEngine(section(swap, device), folder)
    await engine.start(model_dir, weights, 0, root_of(weights))
    await measure(engine, 0)
    before = await measure(engine, 1)
    load_bytes = sum(tensor.nbytes for name, tensor in weights.items() if names in name)
    pauses: list[float] = []
    waits: list[float] = []
    busy = [asyncio.create_task(_keep_full(engine, seed)) for seed in range(PROMPTS)]
    held = weights
    for version in range(1, count + 1):
        held = stepped(held, version, names)
        started = time.perf_counter()
        pauses.append(await engine.load(held, version, root_of(held)))
        waits.append(time.perf_counter() - started)
    for task in busy:
        task.cancel()
    await asyncio.wait(busy)
    after = await measure(engine, 2)
    await engine.close()
    result: dict[str, object] = {
        "swap": swap,
        "changed": names or "every tensor",
        "policy_bytes": sum(tensor.nbytes for tensor in weights.values()),
        "changed_bytes": load_bytes,
        "swaps": count,
        "pause": quantiles(pauses),
        "from_call_to_loaded": quantiles(waits),
        "tokens_per_s": {"before": speed([before], "wall_s")["best"], "after": speed([after], "wall_s")["best"]},
        "tokens_per_cpu_s": {"before": speed([before], "cpu_s")["best"], "after": speed([after], "cpu_s")["best"]},
    }
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


async def _keep_full(engine: VllmEngine, seed: int) -> None:
    request = requests(seed)[seed % PROMPTS]
    while True:
        await engine.generate(request)


async def run(arguments: argparse.Namespace) -> dict[str, object]:
    device = str(arguments.device)
    result: dict[str, object] = {
        "machine": {
            **machine(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30),
            "device": device,
            "note": "on a CPU float32 and one thread, on a GPU bfloat16",
        },
        "swaps": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in arguments.sizes:
            random_policy(folder / size, TEXT, 320, shape=SHAPES[size])
            weights = read_weights(folder / size)
            cases = [("between_groups", ""), ("in_flight", ""), ("in_flight", "layers.0.self_attn")]
            if arguments.only == "generation":
                cases = []
            for swap, names in cases if size == "1m" else cases[1:2]:
                count = arguments.swaps if size == "1m" else max(3, arguments.swaps // 4)
                done = await swaps(folder / size, weights, folder, device=device, swap=swap, names=names, count=count)
                result["swaps"] += [{"policy": size, **done}]
            if size == "1m" and arguments.only != "swaps":
                result["generation"] = await compare(
                    folder / size, weights, folder, device=device, rounds=arguments.rounds
                )
    result["engine"] = {"vllm": VllmEngine(section("in_flight", device), Path()).info.version}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--only", choices=("swaps", "generation"), help="one of the two parts")
    parser.add_argument("--sizes", nargs="+", default=list(CPU_SIZES), choices=list(SHAPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.bare, arguments.device)
        return
    text = json.dumps(asyncio.run(run(arguments)), indent=2) + "\n"
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()

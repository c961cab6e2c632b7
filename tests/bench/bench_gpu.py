"""What a new version costs a learner whose policy lies on a GPU, and a sampler that swaps it in.

    python -m tests.bench.bench_gpu [--shapes 1.7B 8B] [--turns 5] [--out tests/bench/results/gpu.json]

Policies with random weights in the shapes of Qwen3, float32 masters on the device. Each turn moves them as one step at
1e-6 does, by `LEARNING_RATE` times a draw from N(0, `UPDATE_RMS`), then takes the learner's own path, compared on the
device (`device`) and, in the same turn, by way of a copy of all weights (`host`), which gives the same bytes:

- `take_s`: the step time added. What the training step waits for, and all that it waits for.
- `finish_s`: the host's copy of the new version is made, beside the next step. `host` has it already.
- `encode_s`: coding, hashing and building the update; `host` compares here, `device` did so in `take_s`. Nothing trains
  meanwhile, whose kernels would compete with those of `xc`.
- `gb_per_s`: model bytes over the sum of them.
- `bus_bytes`: between device and host, both ways.
- `swap_s`: how long generation stops while transformers takes the new weights from the host.

A machine without CUDA measures nothing and says so; `--device cpu --shapes tiny --out FILE` tries the code there. For
vLLM's swap on a GPU: `tests.bench.bench_engine --device cuda`. 8B needs 70 GB on the device and 60 GB on the host.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from numpy.typing import NDArray
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.learner.policy import Policy
from services.learner.snapshots import Snapshots
from services.sampler.model_weights import copy_into_model, pair_tensors
from services.wire import torch_scan
from services.wire.delta import Codec, Weights, compiled, iter_encode, root_of
from services.wire.delta.codec import Comparison
from services.wire.delta.memory import Memory
from services.wire.torch_scan import DeviceComparison
from tests.bench.machine import machine
from tests.bench.weight_traces import WEIGHTS_STD

RESULTS = Path(__file__).parent / "results" / "gpu.json"
LEARNING_RATE = 1e-6
UPDATE_RMS = 0.224
"""Of a step over the learning rate, in the AdamW trace of tests/bench/weight_traces.py."""
SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 512},
    "1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}


def random_policy(shape: str, device: torch.device) -> Policy:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 8, "head_dim": 128, **SHAPES[shape]}
    sizes["num_key_value_heads"] = min(sizes["num_key_value_heads"], sizes["num_attention_heads"])
    config = Qwen3Config(**sizes, max_position_embeddings=512, initializer_range=WEIGHTS_STD)
    with device:
        model = Qwen3ForCausalLM(config).float()
    return Policy(model=model, files={}, device=device, vocab_size=config.vocab_size)


@torch.no_grad()
def move(policy: Policy) -> None:
    """As a step of the optimizer does."""
    for parameter in policy.model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=LEARNING_RATE * UPDATE_RMS)


class Bus:
    """Bytes that torch_scan has moved between device and host."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()

    def _add(self, size: int) -> None:
        with self._lock:
            self.bytes += size

    @contextlib.contextmanager
    def counting(self) -> Generator[None]:
        to_host, to_device = torch_scan.to_host, torch_scan.to_device

        def counted_to_host(tensor: torch.Tensor) -> NDArray[Any]:
            self._add(tensor.nbytes)
            return to_host(tensor)

        def counted_to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
            self._add(array.nbytes)
            return to_device(array, device)

        with (
            patch.object(torch_scan, "to_host", counted_to_host),
            patch.object(torch_scan, "to_device", counted_to_device),
        ):
            yield


class Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.row: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Generator[None]:
        self._settle()
        began = time.perf_counter()
        yield
        self._settle()
        self.row[name] = time.perf_counter() - began

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def encoded(
    base: Weights, root: str, new: Weights, codec: Codec, comparison: Comparison | None, workers: int
) -> tuple[str, int]:
    """SHA-256 of the parts, and their bytes."""
    digest, size = hashlib.sha256(), 0
    for part in iter_encode(
        base,
        new,
        run_id="bench",
        base_version=0,
        target_version=1,
        base_root=root,
        codec=codec,
        workers=workers,
        comparison=comparison,
        root_last=True,
    ):
        digest.update(part)
        size += len(part)
    return digest.hexdigest(), size


def measure(shape: str, device: torch.device, turns: int, workers: int) -> dict[str, object]:
    assert compiled.prepare(), "these are the speeds of a learner, which has numba"
    policy = random_policy(shape, device)
    snapshots = Snapshots(policy, on_device=True, workers=workers)
    snapshots.take()
    base, _ = snapshots.finish()
    root = root_of(base, workers)
    model_bytes = sum(tensor.nbytes for tensor in base.values())
    rows: dict[str, list[dict[str, float]]] = {}
    host_memory = Memory()
    changed = 0
    for turn in range(turns + 1):  # the first one warms up
        move(policy)
        bus = Bus()
        with bus.counting():
            device_watch = Stopwatch(device)
            with device_watch("take_s"):
                snapshots.take()
            with device_watch("finish_s"):
                new, comparison = snapshots.finish()
        assert isinstance(comparison, DeviceComparison)
        host_watch = Stopwatch(device)
        with host_watch("take_s"):
            copied = policy.wire_weights(host_memory)
        taken = bus.bytes
        for codec in (Codec.SX, Codec.XC):
            bus.bytes = taken
            with device_watch("encode_s"), bus.counting():
                ours = encoded(base, root, new, codec, comparison, workers)
            with host_watch("encode_s"):
                theirs = encoded(base, root, copied, codec, None, workers)
            assert ours == theirs, "the device's update is another one than the host's"
            for way, watch, crossed in (("device", device_watch, bus.bytes), ("host", host_watch, model_bytes)):
                seconds = sum(watch.row.values())
                row = {**watch.row, "seconds": seconds, "bus_bytes": crossed, "update_bytes": ours[1]}
                if turn:
                    rows.setdefault(f"{codec}_{way}", []).append(row)
        changed = sum(changes.positions.size for changes in comparison.found.values())
        del copied, comparison
        base, root = new, root_of(new, workers)
        print(f"{shape} turn {turn} of {turns}", file=sys.stderr, flush=True)
    medians = {
        key: {name: statistics.median(row[name] for row in values) for name in values[0]}
        for key, values in rows.items()
    }
    for values in medians.values():
        values["gb_per_s"] = model_bytes / 1e9 / values["seconds"]
    del snapshots  # and with it the bits on the device
    swaps = measure_swaps(policy, base, turns)
    return {
        "parameters": model_bytes // 2,
        "model_bytes": model_bytes,
        "workers": workers,
        "changed_share": changed / (model_bytes // 2),
        **medians,
        "swap_s": statistics.median(swaps),
        "turns": {**rows, "swap_s": swaps},
    }


def measure_swaps(policy: Policy, weights: Weights, turns: int) -> list[float]:
    """Seconds in which the transformers engine generates nothing. The policy is a sampler's afterwards, in bf16."""
    policy.model.bfloat16()
    watch = Stopwatch(policy.device)
    seconds: list[float] = []
    for _ in range(turns + 1):
        pairs = pair_tensors(policy.model, weights)
        with watch("swap"):
            copy_into_model(pairs)
        seconds.append(watch.row["swap"])
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.7B", "8B"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cuda" and arguments.out is None:
        parser.error(f"name a file by --out: {RESULTS.name} is for GPUs")
    out: Path = arguments.out or RESULTS
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_gpu: torch sees no CUDA device here, so nothing is measured; the other rows do not need one")
        return
    results: dict[str, object] = {
        "machine": {
            **machine(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "torch": torch.__version__,
        }
    }
    for shape in arguments.shapes:
        results[shape] = measure(shape, device, arguments.turns, arguments.workers)
        out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

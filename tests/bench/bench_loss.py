"""Time and memory of log-probs and loss: chunked against plain, every loss, and the loss's share of a training step.

    python tests/bench/bench_loss.py --out FILE.json [--device cuda] [--tokens N] [--hidden H] [--vocab V]

Each log-prob method runs in a process of its own, so that its peak is its own. On a CPU the peak is the growth of the
process's resident set over what stood before the call, on CUDA the allocator's. Seconds are the process's CPU time on
a CPU, so that neighbours on the machine do not count, and wall time on CUDA.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from services.learner.logprobs import logprobs_of_logits, token_logprobs
from services.learner.losses.batch import Batch
from services.learner.losses.evaluate import loss_of
from services.learner.losses.metrics import finish_metrics
from services.learner.losses.prepare import prepare
from services.learner.losses.settings import LossName, LossSettings

REPEATS = 2


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clock(device: str) -> float:
    return time.perf_counter() if device.startswith("cuda") else time.process_time()


def best_of(action: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of a few runs after one that warms up."""
    action()
    times = []
    for _ in range(REPEATS):
        synchronise(device)
        started = clock(device)
        action()
        synchronise(device)
        times.append(clock(device) - started)
    return min(times)


def peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def logprob_child(method: str, device: str, tokens: int, hidden: int, vocab: int) -> dict[str, float]:
    """One method's forward and backward, with entropy, from hidden states and head to their gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(1, tokens, hidden, generator=generator).to(device).requires_grad_()
    head_VH = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(device).requires_grad_()
    targets_BT = torch.randint(0, vocab, (1, tokens), generator=generator).to(device)
    weights_BT = torch.randn(1, tokens, generator=generator).to(device)

    def once() -> None:
        hidden_BTH.grad = head_VH.grad = None
        if method == "plain":
            result = logprobs_of_logits(hidden_BTH @ head_VH.t(), targets_BT)
        else:
            result = token_logprobs(hidden_BTH, head_VH, targets_BT, with_entropy=True, chunk_tokens=int(method))
        (weights_BT * result.logprobs_BT).sum().backward()

    before = peak_bytes(device)
    once()
    peak = peak_bytes(device) - before
    return {"seconds": best_of(once, device), "peak_mb": peak / 2**20}


def logprob_methods(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    results = {}
    for method in ("plain", "512", "128", "32"):
        command = [sys.executable, __file__, "--child", method, "--device", arguments.device]
        for key in ("tokens", "hidden", "vocab"):
            command += [f"--{key}", str(getattr(arguments, key))]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
        results["plain" if method == "plain" else f"chunk_{method}"] = json.loads(done.stdout)
    return results


def loss_inputs(rows: int, tokens: int, device: str) -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sampler_BT = -torch.rand(rows, tokens, generator=generator) * 2.0
    lengths_B1 = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    learner_BT = (sampler_BT + 0.05 * torch.randn(rows, tokens, generator=generator)).clamp(max=0.0)
    batch = Batch(
        sampler_logprobs_BT=sampler_BT.to(device),
        mask_BT=(torch.arange(tokens)[None, :] < lengths_B1).to(device),
        rewards_B=torch.randint(0, 2, (rows,), generator=generator).float().to(device),
        group_B=(torch.arange(rows) // 8).to(device),
    )
    return batch, learner_BT.to(device).requires_grad_()


def loss_seconds(batch: Batch, learner_BT: Tensor, settings: LossSettings) -> dict[str, float]:
    """Seconds of each phase; loss with its backward to the log-probs, and the metrics."""
    device = learner_BT.device.type
    prepared = prepare(batch, settings)

    def once() -> None:
        learner_BT.grad = None
        output = loss_of(prepared, learner_BT)
        output.loss.backward()
        finish_metrics([output.metrics])

    return {"prepare_s": best_of(lambda: prepare(batch, settings), device), "loss_s": best_of(once, device)}


def step_share(device: str, rows: int, tokens: int) -> dict[str, float]:
    """A Qwen3-shaped policy, full vocabulary and a small body: the share is an upper bound for larger bodies."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=151_936,
    )
    model = Qwen3ForCausalLM(config).to(device)
    batch, _ = loss_inputs(rows, tokens, device)
    token_ids_BL = torch.randint(0, 1000, (rows, tokens + 1), device=device)
    head_VH = model.get_output_embeddings().weight
    spent = {"loss": 0.0}

    def once() -> None:
        model.zero_grad(set_to_none=True)
        hidden_BTH = model.model(token_ids_BL[:, :-1]).last_hidden_state
        logprobs_BT = token_logprobs(hidden_BTH, head_VH, token_ids_BL[:, 1:], mask_BT=batch.mask_BT).logprobs_BT
        synchronise(device)
        started = clock(device)
        leaf_BT = logprobs_BT.detach().requires_grad_()
        output = loss_of(prepare(batch, LossSettings()), leaf_BT)
        output.loss.backward()
        finish_metrics([output.metrics])
        synchronise(device)
        spent["loss"] = clock(device) - started
        logprobs_BT.backward(leaf_BT.grad)

    step_s = best_of(once, device)
    return {
        "parameters_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "rows": rows,
        "tokens": int(batch.mask_BT.sum()),
        "step_s": step_s,
        "loss_s": spent["loss"],
        "loss_share": spent["loss"] / step_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=151_936)
    arguments = parser.parse_args()
    if arguments.child:
        print(
            json.dumps(
                logprob_child(arguments.child, *(vars(arguments)[k] for k in ("device", "tokens", "hidden", "vocab")))
            )
        )
        return
    batch, learner_BT = loss_inputs(256, 1024, arguments.device)
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu"
    result = {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "logprobs": {
            "tokens": arguments.tokens,
            "hidden": arguments.hidden,
            "vocab": arguments.vocab,
            "logits_float32_mb": arguments.tokens * arguments.vocab * 4 / 2**20,
            "methods": logprob_methods(arguments),
        },
        "losses_256x1024": {name.value: loss_seconds(batch, learner_BT, LossSettings(name=name)) for name in LossName},
        "step": step_share(arguments.device, rows=16, tokens=64),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

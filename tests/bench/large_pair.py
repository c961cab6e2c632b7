"""Two versions of a policy in the shapes of Qwen3-0.6B, one AdamW step at 1e-6 apart: for bench_wan `against`.

As tests/bench/weight_traces.py, on fewer and shorter batches: Adam's averages are filled by `WARM_UP_STEPS` steps at
learning rate 0 on 2 × 16 tokens, which with betas (0.9, 0.95) is most of their memory.

    python -m tests.bench.large_pair DIR        (about 11 GB of RAM and 2.4 GB of disk; minutes)
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen3Config

from services.wire.delta import write_weights
from services.wire.torch_bits import to_bits
from tests.bench.weight_traces import WEIGHTS_STD, Training, has_all, main, snapshot_path

LEARNING_RATE = 1e-6
WARM_UP_STEPS = 24
ROWS = 2
TOKENS = 16


def model_config() -> Qwen3Config:
    """596M parameters."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=WEIGHTS_STD,
    )


def make_pair(folder: Path) -> None:
    """Writes versions 0 and 1, where bench_wan looks for them, unless they are there."""
    old, new = (snapshot_path(folder, LEARNING_RATE, number) for number in (0, 1))
    config = model_config()
    if has_all((old, new), config):
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the bits depend on it
    training = Training(config=config, rows=ROWS, tokens=TOKENS)
    for number in range(WARM_UP_STEPS):
        training.step()
        print(f"warm-up step {number + 1}", file=sys.stderr, flush=True)
    write_weights(to_bits(training.model.state_dict()), old)
    for group in training.optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    training.step()
    write_weights(to_bits(training.model.state_dict()), new)


if __name__ == "__main__":
    main(__doc__, make_pair)

"""Weights as training leaves them: bf16 snapshots of a Qwen3-shaped model under AdamW on fp32 masters.

The loss is a policy gradient on random tokens with random advantages: gradients with the noise of reinforcement
learning, in which most weights move less than a bf16 rounding step. How large that step is depends on how large the
weights are, so they are drawn as wide as trained ones are: their median magnitude is 0.019, the lower end of what is
published for trained language models (0.019 to 0.1), where the library's default of 0.02 for training from nothing has
0.0135. Optimizer settings are the project's defaults. Adam's averages are filled first, with learning rate 0, so that
no step is one of the cold ones in which every weight moves by the whole learning rate. Every learning rate starts from
that same state and sees the same batches.

    python -m tests.bench.weight_traces DIR        (about 2 GB of RAM and 11 GB of disk; minutes)
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.wire.delta import BitTensor, write_weights
from services.wire.torch_bits import to_bits

LEARNING_RATES = (1e-6, 5e-6, 1e-5)
GAPS = (1, 4, 16, 64)
KEPT_STEPS = (*range(17), 64)
WARM_UP_STEPS = 40
ROWS = 4
TOKENS = 32
VOCABULARY = 8192
MOST_HEADER_BYTES = 1 << 20
BETAS = (0.9, 0.95)
WEIGHTS_STD = 0.028
"""A normal distribution's median magnitude is 0.674 of its standard deviation."""


def model_config() -> Qwen3Config:
    """83.9M parameters in the shapes of Qwen3: grouped-query attention, q and k norms, gated MLP, tied embeddings."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=1920,
        num_hidden_layers=16,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=WEIGHTS_STD,
    )


class Training:
    """A model, its optimizer and its stream of batches of `rows` × `tokens`."""

    def __init__(
        self, seed: int = 0, config: Qwen3Config | None = None, rows: int = ROWS, tokens: int = TOKENS
    ) -> None:
        torch.manual_seed(seed)
        self.model = Qwen3ForCausalLM(config or model_config()).float()
        self.shape = (rows, tokens)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
        self.generator = torch.Generator().manual_seed(seed + 1)

    def step(self) -> None:
        tokens_BT = torch.randint(0, self.model.config.vocab_size, self.shape, generator=self.generator)
        advantage_B = torch.randn(self.shape[0], generator=self.generator)
        logits_BTV = self.model(input_ids=tokens_BT).logits[:, :-1]
        picked_BT = torch.log_softmax(logits_BTV, -1).gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)
        loss = -(advantage_B[:, None] * picked_BT).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def traces() -> Iterator[tuple[float, int, dict[str, BitTensor]]]:
    """(learning rate, step, bf16 weights) for the kept steps of every learning rate."""
    training = Training()
    for _ in range(WARM_UP_STEPS):
        training.step()
    start = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    batches = training.generator.get_state()
    for lr in LEARNING_RATES:
        training.model.load_state_dict(start[0])
        training.optimizer.load_state_dict(copy.deepcopy(start[1]))
        training.generator.set_state(batches)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        for step in range(max(KEPT_STEPS) + 1):
            if step:
                training.step()
            if step in KEPT_STEPS:
                yield lr, step, to_bits(training.model.state_dict())


def snapshot_path(folder: Path, lr: float, step: int) -> Path:
    return folder / f"{lr:.0e}-{step:02d}.safetensors"


def has_all(paths: Iterable[Path], config: Qwen3Config) -> bool:
    """Whether there is a snapshot of this model under each name. Files appear under their names when they are whole;
    those of another model have the same names and other sizes."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    tensor_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    return all(
        path.is_file() and tensor_bytes < path.stat().st_size < tensor_bytes + MOST_HEADER_BYTES for path in paths
    )


def make_traces(folder: Path) -> None:
    """Writes all snapshots, unless they are there: then the folder is left as it is."""
    wanted = [snapshot_path(folder, lr, step) for lr in LEARNING_RATES for step in KEPT_STEPS]
    if has_all(wanted, model_config()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the bits depend on it
    for lr, step, weights in traces():
        write_weights(weights, snapshot_path(folder, lr, step))
        print(f"lr {lr:.0e} step {step}", file=sys.stderr, flush=True)


def main(description: str | None, make: Callable[[Path], None]) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made where it is not there")
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main(__doc__, make_traces)

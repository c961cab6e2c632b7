"""Makes the policy that ships with the demo: `python -m services.lab.warmup --out services/lab/assets/tiny-policy`.

Supervised on three-digit sums as a careless pupil writes them: every carry into the next column is forgotten with
chance 0.7. The policy learns what he does, carries included, but its best guess is a sum without carries: about 30 %
right. That is where reinforcement learning takes over, as with any pretrained model: what is right is already in the
distribution, and the reward has to bring it out. (A policy that is merely stopped early at 30 % has not learned what a
carry is; rewards of whole answers then teach it too slowly for a demo: 5 points in 120 steps.)

The same seed on the same machine and torch gives the same bytes. Takes about four minutes of one core.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from services.lab.arithmetic import Difficulty, Problem, Split, distinct_problems, problems
from services.lab.tiny_policy import EOS_TOKEN, PolicyShape, character_tokenizer, save_policy, tiny_model
from services.runtime.errors import ConfigError

_IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """How the policy is supervised; the defaults made the shipped one."""

    seed: int = 0
    """Of the untrained weights and the sums."""
    pupil_seed: int = 5
    """Of which carries the pupil does."""
    steps: int = 1000
    batch_problems: int = 256
    lr: float = 2.5e-3
    carry_chance: float = 0.3
    """Chance that the pupil does a carry into the next column."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_problems) < 1 or not 0 <= self.carry_chance <= 1:
            raise ConfigError("steps and batch_problems must be 1 or more, and carry_chance between 0 and 1.")

    def lr_at(self, step: int) -> float:
        """Linear warm-up over 50 steps, linear decay to zero over the last 40 %. `step` counts from 0."""
        return self.lr * min(1.0, (step + 1) / 50, (self.steps - step) / (0.4 * self.steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of whole answers that are right: of the best guess, and expected of a draw at temperature 1."""

    greedy: float
    sampled: float


def careless_sum(left: int, right: int, carry_chance: float, rng: random.Random) -> str:
    """`left + right` by columns, each carry into another column done with `carry_chance`, else forgotten.

    A carry out of the last column is always written: there it is only a 1 in front.
    """
    width = max(len(str(left)), len(str(right)))
    columns = zip(reversed(str(left).zfill(width)), reversed(str(right).zfill(width)), strict=True)
    digits: list[str] = []
    carry = 0
    for place, (one, other) in enumerate(columns, 1):
        total = int(one) + int(other) + carry
        digits.append(str(total % 10))
        carry = total // 10
        if carry and place < width and rng.random() >= carry_chance:
            carry = 0
    if carry:
        digits.append("1")
    return "".join(reversed(digits))


def supervise(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, warm_up: WarmUp, difficulty: Difficulty
) -> None:
    """Trains `model` in place on training-split sums as the careless pupil answers them."""
    rng = random.Random(warm_up.pupil_seed)
    stream = problems(Split.TRAIN, seed=warm_up.seed, difficulty=difficulty)
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm_up.lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(warm_up.steps):
        batch = [_as_pupil(problem, warm_up, rng) for problem in itertools.islice(stream, warm_up.batch_problems)]
        tokens_BT, targets_BT = _encode(tokenizer, batch)
        answer_BT = targets_BT != _IGNORED
        logprobs_BTV = torch.log_softmax(model(tokens_BT, use_cache=False).logits, dim=-1)
        loss = -(_of_targets(logprobs_BTV, targets_BT) * answer_BT).sum() / answer_BT.sum()
        for group in optimizer.param_groups:
            group["lr"] = warm_up.lr_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {warm_up.steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def measure(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Sequence[Problem]) -> Accuracy:
    """Exact, without drawing: a greedy answer is right if each of its tokens (with eos) is the likeliest after the
    right ones before it, and a drawn one is right with the product of their probabilities."""
    tokens_BT, targets_BT = _encode(tokenizer, held_out)
    logprobs_BTV = torch.log_softmax(model(tokens_BT, use_cache=False).logits.float(), dim=-1)
    answer_BT = targets_BT != _IGNORED
    right_BT = (logprobs_BTV.argmax(-1) == targets_BT) | ~answer_BT
    sampled_B = (_of_targets(logprobs_BTV, targets_BT) * answer_BT).sum(1).exp()
    return Accuracy(greedy=right_BT.all(1).float().mean().item(), sampled=sampled_B.mean().item())


def _of_targets(logprobs_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Log-probs [B, T] of the targets; where there is none, of any token."""
    return logprobs_BTV.gather(-1, targets_BT.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _as_pupil(problem: Problem, warm_up: WarmUp, rng: random.Random) -> Problem:
    left, right = problem.prompt.removesuffix("=").split("+")
    return Problem(prompt=problem.prompt, answer=careless_sum(int(left), int(right), warm_up.carry_chance, rng))


def _encode(tokenizer: PreTrainedTokenizerFast, batch: Sequence[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and, one place earlier, targets, both [B, T]; targets outside answer and eos are _IGNORED."""
    rows: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for problem in batch:
        row = torch.tensor(tokenizer.encode(problem.prompt + problem.answer + EOS_TOKEN))
        target = row[1:].clone()
        target[: len(problem.prompt) - 1] = _IGNORED  # one token per character
        rows.append(row[:-1])
        targets.append(target)
    # Padding is on the right, where causal attention keeps it from what counts.
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(targets, batch_first=True, padding_value=_IGNORED)


_CARD = """# tiny-policy

A Qwen3-architecture policy of {parameters:,} parameters (bf16) that adds three-digit numbers badly, as the start of the
demo. One token per character; the chat template is the bare prompt: `358+467=` is answered by `825` and `<eos>`.

Made by

    python -m services.lab.warmup --out services/lab/assets/tiny-policy

with torch {torch} on a CPU: {steps} supervised steps of {batch} sums, seed {seed}, written by a careless pupil who
forgets a carry into the next column with chance {forgets:.1f}. So a carry is in the policy's distribution, but not its
best guess.

| held-out sums: {held_out} that no training file can contain | right |
|---|---|
| greedy | {greedy:.1%} |
| sampled at temperature 1.0 (expected) | {sampled:.1%} |

Apache-2.0, like the rest of the repository. It knows nothing but sums of two three-digit numbers.
"""


def make(out: Path, warm_up: WarmUp) -> Accuracy:
    """Writes the policy and its card into `out` and returns its held-out accuracy as stored, in bf16."""
    torch.set_num_threads(1)  # the sums of several threads come in any order: the same seed would not be enough
    difficulty = Difficulty()
    tokenizer = character_tokenizer()
    model = tiny_model(tokenizer, PolicyShape(), seed=warm_up.seed)
    supervise(model, tokenizer, warm_up, difficulty)
    save_policy(out, model, tokenizer)
    held_out = distinct_problems(Split.HELD_OUT, count=2000, seed=warm_up.seed, difficulty=difficulty)
    accuracy = measure(Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32), tokenizer, held_out)
    card = _CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        torch=torch.__version__,
        steps=warm_up.steps,
        batch=warm_up.batch_problems,
        seed=warm_up.seed,
        forgets=1 - warm_up.carry_chance,
        held_out=len(held_out),
        greedy=accuracy.greedy,
        sampled=accuracy.sampled,
    )
    (out / "README.md").write_text(card)
    return accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the policy."""
    parser = argparse.ArgumentParser(prog="services.lab.warmup", description="Make the demo's policy.")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=WarmUp().seed)
    parser.add_argument("--steps", type=int, default=WarmUp().steps)
    arguments = parser.parse_args(argv)
    accuracy = make(arguments.out, WarmUp(seed=arguments.seed, steps=arguments.steps))
    print(f"{arguments.out}: held-out accuracy {accuracy.greedy:.1%} greedy, {accuracy.sampled:.1%} sampled")
    return 0


if __name__ == "__main__":
    sys.exit(main())

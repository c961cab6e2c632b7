"""The synthetic task of the demo: sums with one right answer, as many as wanted, from a seed.

A problem is a line of text such as `358+467=` with the answer `825`. Which split it belongs to is decided by a hash
of that text and by nothing else: no seed, count or difficulty can put a held-out problem into a training file.
"""

import enum
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import ConfigError
from services.runtime.files import atomic_write

_HELD_OUT_ONE_IN = 16
# So many draws in a row without a new problem mean that the difficulty has (almost surely) no more of them.
_MAX_BARREN_DRAWS = 20_000


class Split(enum.Enum):
    TRAIN = "train"
    HELD_OUT = "held_out"


class Operator(enum.Enum):
    ADD = "+"
    SUBTRACT = "-"
    MULTIPLY = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    prompt: str
    answer: str

    @property
    def split(self) -> Split:
        digest = hashlib.blake2b(self.prompt.encode(), digest_size=8).digest()
        return Split.HELD_OUT if int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0 else Split.TRAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """How hard the problems are.

    `min_digits`, `max_digits`: decimal digits of each operand, which is drawn uniformly from all numbers of those
    lengths (one digit includes 0). `operators`: drawn with equal chance. Raises ConfigError for an empty choice.
    """

    min_digits: int = 3
    max_digits: int = 3
    operators: tuple[Operator, ...] = (Operator.ADD,)

    def __post_init__(self) -> None:
        if not 1 <= self.min_digits <= self.max_digits <= 18:
            raise ConfigError(
                f"digits must satisfy 1 <= min_digits <= max_digits <= 18, "
                f"not min_digits = {self.min_digits} and max_digits = {self.max_digits}."
            )
        if not self.operators:
            raise ConfigError("operators is empty: name at least one of + - *.")

    def draw(self, rng: random.Random) -> Problem:
        """One problem of either split, by the numbers that `rng` gives."""
        low = 0 if self.min_digits == 1 else 10 ** (self.min_digits - 1)
        high = 10**self.max_digits - 1
        left, right = rng.randint(low, high), rng.randint(low, high)
        operator = rng.choice(self.operators)
        match operator:
            case Operator.ADD:
                answer = left + right
            case Operator.SUBTRACT:
                answer = left - right
            case Operator.MULTIPLY:
                answer = left * right
        return Problem(prompt=f"{left}{operator.value}{right}=", answer=str(answer))


def problems(split: Split, *, seed: int, difficulty: Difficulty) -> Iterator[Problem]:
    """Endless problems of one split, repeats allowed, always the same for the same arguments."""
    rng = random.Random(f"{split.value}:{seed}")
    while True:
        problem = difficulty.draw(rng)
        if problem.split is split:
            yield problem


def distinct_problems(split: Split, *, count: int, seed: int, difficulty: Difficulty) -> list[Problem]:
    """`count` problems of one split, no two alike. Raises ConfigError if the difficulty has fewer."""
    if count < 1:
        raise ConfigError(f"count must be at least 1, not {count}.")
    found: dict[str, Problem] = {}
    rng = random.Random(f"{split.value}:{seed}")
    barren = 0
    while len(found) < count:
        problem = difficulty.draw(rng)
        if problem.split is split and problem.prompt not in found:
            found[problem.prompt] = problem
            barren = 0
            continue
        barren += 1
        if barren == _MAX_BARREN_DRAWS:
            raise ConfigError(
                f"this difficulty has only {len(found)} {split.value} problems: ask for fewer or more digits."
            )
    return list(found.values())


def write_dataset(
    path: Path, split: Split, count: int, seed: int, difficulty: Difficulty | None = None
) -> list[Problem]:
    """Writes `count` distinct problems as lines `{"prompt": "358+467=", "answer": "825"}` and returns them.

    The file appears whole or not at all. Raises ConfigError if the difficulty has fewer than `count` problems.
    """
    chosen = distinct_problems(split, count=count, seed=seed, difficulty=difficulty or Difficulty())
    lines = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) + "\n" for problem in chosen]
    atomic_write(path, "".join(lines).encode())
    return chosen

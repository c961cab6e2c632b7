"""The laboratory's tasks: sums of two numbers as tokens, drawn without end, graded exactly.

    prompt   a0 b0 a1 b1 … a4 b4      digits by column, lowest first, blank where a number has ended
    fixed    s0 s1 … s5               five-digit numbers: always six tokens, no end token
    variable s0 s1 … <eos>            numbers of one to five digits: two to seven tokens
    worked   a0+b0+c0=xy a1+b1+c1=xy … > s0 s1 … <eos>      the carries written out first: 11 to 48 tokens

Rewards are 1 for the right sum and 0 otherwise; `worked` looks only at what follows `>`.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

PAD, EOS, ZERO, BLANK, PLUS, EQUALS, THEN = 0, 1, 2, 12, 13, 14, 15
VOCAB_SIZE = 16
"""Ten digits begin at ZERO."""


class TaskName(StrEnum):
    FIXED = "fixed"
    VARIABLE = "variable"
    WORKED = "worked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """P problems. `answers_PT` is what a model is supervised with, PAD behind its end."""

    prompts_PL: Tensor
    answers_PT: Tensor
    sums_P: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SumTask:
    """`columns`: most digits of a number."""

    name: TaskName
    columns: int = 5

    @property
    def prompt_tokens(self) -> int:
        return 2 * self.columns

    @property
    def stops_at_end(self) -> bool:
        """Whether a completion ends with EOS; else at `max_tokens`, and is not over-long for that."""
        return self.name is not TaskName.FIXED

    @property
    def one_answer(self) -> bool:
        """Whether exactly one completion is right: the chance of drawing it is then the accuracy."""
        return self.name is not TaskName.WORKED

    @property
    def max_tokens(self) -> int:
        match self.name:
            case TaskName.FIXED:
                return self.columns + 1
            case TaskName.VARIABLE:
                return self.columns + 3
            case TaskName.WORKED:
                return 8 * self.columns + self.columns + 11

    def draw(self, count: int, seed: int) -> Problems:
        """`count` problems, the same for the same seed: numbers uniform among those with their number of digits."""
        random = torch.Generator().manual_seed(seed)
        shape = (count, 2)
        fewest = self.columns if self.name is TaskName.FIXED else 1
        digits = torch.randint(fewest, self.columns + 1, shape, generator=random)
        low = torch.where(digits == 1, 0, 10 ** (digits - 1))
        share = torch.rand(shape, dtype=torch.float64, generator=random)
        numbers = low + (share * (10**digits - low)).long()
        columns = _digits(numbers, self.columns).where(_places(self.columns) < digits[..., None], BLANK - ZERO)
        return Problems(
            prompts_PL=(columns + ZERO).transpose(1, 2).reshape(count, -1),
            answers_PT=self._answers(numbers),
            sums_P=numbers.sum(1),
        )

    def rewards(self, problems: Problems, tokens_BT: Tensor, length_B: Tensor) -> Tensor:
        """1.0 or 0.0 for each row, [B]; rows of one problem are adjacent, `tokens_BT` is PAD behind each end."""
        repeats = tokens_BT.shape[0] // problems.prompts_PL.shape[0]
        if self.one_answer:
            answers_BT = problems.answers_PT.repeat_interleave(repeats, 0)
            return (tokens_BT == answers_BT).all(1).double()
        sums = problems.sums_P.repeat_interleave(repeats).tolist()
        rows = zip(tokens_BT.tolist(), length_B.tolist(), sums, strict=True)
        return torch.tensor([float(_final(row[:length]) == total) for row, length, total in rows], dtype=torch.float64)

    def _answers(self, numbers_P2: Tensor) -> Tensor:
        sums_P = numbers_P2.sum(1)
        if self.name is TaskName.FIXED:
            return _digits(sums_P, self.max_tokens) + ZERO
        answers_PT = torch.zeros((len(sums_P), self.max_tokens), dtype=torch.int64)
        for row, ((left, right), total) in enumerate(zip(numbers_P2.tolist(), sums_P.tolist(), strict=True)):
            working = _working(left, right) if self.name is TaskName.WORKED else []
            ids = [*working, *(ZERO + int(digit) for digit in reversed(str(total))), EOS]
            answers_PT[row, : len(ids)] = torch.tensor(ids)
        return answers_PT


def _places(count: int) -> Tensor:
    return torch.arange(count)


def _digits(numbers: Tensor, count: int) -> Tensor:
    """[…] -> […, count], lowest first."""
    return numbers[..., None] // 10 ** _places(count) % 10


def _working(left: int, right: int) -> list[int]:
    ids: list[int] = []
    carry = 0
    while left or right or not ids:
        total = left % 10 + right % 10 + carry
        ids += [ZERO + left % 10, PLUS, ZERO + right % 10, PLUS, ZERO + carry, EQUALS, ZERO + total // 10]
        ids.append(ZERO + total % 10)
        left, right, carry = left // 10, right // 10, total // 10
    return [*ids, THEN]


def _final(ids: list[int]) -> int | None:
    """The number between the first THEN and the EOS at the end; None where there is none, or it begins with 0."""
    if not ids or ids[-1] != EOS or THEN not in ids:
        return None
    digits = [token - ZERO for token in ids[ids.index(THEN) + 1 : -1]]
    if not digits or not all(0 <= digit <= 9 for digit in digits) or (digits[-1] == 0 and len(digits) > 1):
        return None
    return sum(digit * 10**place for place, digit in enumerate(digits))

"""Evaluates a checked case in float64 and lays the result out as JSON or as text."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from services.learner.loss_cases import LossCase
from services.learner.losses.batch import Batch
from services.learner.losses.evaluate import loss_of, terms_of
from services.learner.losses.metrics import finish_metrics
from services.learner.losses.prepare import prepare
from services.learner.losses.prepared import Exclusion
from services.runtime.errors import BadInputError

Weight = float | None | list[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcludedRow:
    row: int
    """Counted from 0."""
    reason: str
    """A name of `Exclusion`, in lower case, or learner_nonfinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """The keys of one object of `heterorl loss --json`, in this order."""

    name: str
    loss_name: str
    loss: float
    gradient: list[list[float]]
    """d loss / d learner_logprobs, in the shape of the case; 0 where the mask is 0."""
    importance_weights: list[Weight]
    """Before clipping: per row, or per token for token losses; null for what takes no part."""
    clip_share: float
    advantages: list[float]
    excluded: list[ExcludedRow]
    metrics: dict[str, float]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def evaluate_case(case: LossCase) -> CaseResult:
    """Raises BadInputError where the batch does not fit its loss (bnpo with a reward of 2)."""
    lengths = [len(row) for row in case.mask]
    width = max(max(lengths), 1)
    mask_BT = torch.tensor([row + [False] * (width - len(row)) for row in case.mask], dtype=torch.bool)
    tensors = {key: _padded(rows, width) for key, rows in case.logprobs.items()}
    batch = Batch(
        sampler_logprobs_BT=tensors["sampler_logprobs"],
        mask_BT=mask_BT,
        rewards_B=torch.tensor(case.rewards, dtype=torch.float64),
        group_B=torch.arange(len(lengths)) // case.group_size,
        overlong_B=None if case.overlong is None else torch.tensor(case.overlong),
        staleness_B=None if case.staleness is None else torch.tensor(case.staleness, dtype=torch.float64),
        proximal_logprobs_BT=tensors.get("proximal_logprobs"),
        reference_logprobs_BT=tensors.get("reference_logprobs"),
    )
    try:
        prepared = prepare(batch, case.settings)
    except ValueError as error:
        raise BadInputError(f"case {case.name!r}: {error}") from None
    learner_BT = tensors["learner_logprobs"].requires_grad_()
    output = loss_of(prepared, learner_BT)
    output.loss.backward()
    metrics = finish_metrics([output.metrics])
    if not all(map(math.isfinite, metrics.values())):
        raise BadInputError(f"case {case.name!r}: the result is not finite: log-probs, rewards or options are too big")
    gradient_BT = torch.zeros_like(learner_BT) if learner_BT.grad is None else learner_BT.grad
    broken_B = prepared.mask_BT.any(1) & ~torch.isfinite(torch.where(mask_BT, learner_BT, 0.0)).all(1)
    part_BT = prepared.mask_BT & ~broken_B[:, None]
    return CaseResult(
        name=case.name,
        loss_name=case.settings.name.value,
        loss=output.loss.item() + 0.0,
        gradient=[row[:n] for row, n in zip((gradient_BT + 0.0).tolist(), lengths, strict=True)],
        importance_weights=_weights(terms_of(prepared, learner_BT.detach()).weight, part_BT, lengths),
        clip_share=metrics["clip_share"],
        advantages=prepared.advantage_B.tolist(),
        excluded=_excluded(prepared.reason_B, broken_B),
        metrics=metrics,
    )


def as_text(result: CaseResult) -> str:
    """A block of lines for people: ten significant digits."""
    lines = [
        f"{result.name}: {result.loss_name}",
        f"  loss        {_short(result.loss)}",
        f"  clip share  {_short(result.clip_share)}",
    ]
    excluded = {entry.row: entry.reason for entry in result.excluded}
    for number, gradient in enumerate(result.gradient):
        lines.append(f"  row {number}  advantage {_short(result.advantages[number])}")
        if number in excluded:
            lines.append(f"    left out: {excluded[number]}")
            continue
        weight = result.importance_weights[number]
        shown = ", ".join(map(_short, weight)) if isinstance(weight, list) else _short(weight)
        lines.append(f"    weight    {shown}")
        lines.append(f"    gradient  {', '.join(map(_short, gradient))}")
    return "\n".join(lines)


def _padded(rows: list[list[float]], width: int) -> Tensor:
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64)


def _weights(weight: Tensor, part_BT: Tensor, lengths: list[int]) -> list[Weight]:
    parts = part_BT.any(1).tolist()
    if weight.ndim == 1:
        return [value if part else None for value, part in zip(weight.tolist(), parts, strict=True)]
    rows: list[Weight] = []
    for values, keep, length in zip(weight.tolist(), part_BT.tolist(), lengths, strict=True):
        rows.append([value if kept else None for value, kept in zip(values[:length], keep[:length], strict=True)])
    return [row if part else None for row, part in zip(rows, parts, strict=True)]


def _excluded(reason_B: Tensor, broken_B: Tensor) -> list[ExcludedRow]:
    entries: list[ExcludedRow] = []
    for row, (reason, broken) in enumerate(zip(reason_B.tolist(), broken_B.tolist(), strict=True)):
        if reason != Exclusion.NONE:
            entries.append(ExcludedRow(row=row, reason=Exclusion(reason).name.lower()))
        elif broken:
            entries.append(ExcludedRow(row=row, reason="learner_nonfinite"))
    return entries


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.10g}"

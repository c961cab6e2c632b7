"""`heterorl lab replay`: the recorded groups of a run under other losses, by their staleness when they were trained.

    journal.sqlite3 ─► groups by staleness bucket ─► one batch each ─► policy's log-probs ─► each loss: loss, gradient

The policy is the one of a directory (the run's last export, as a rule), not the one of the moment: so log-ratios are
larger than they were in the run, and larger for early groups. The buckets compare losses, not moments of the run.
"""

import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from services.learner.batches import TrainGroup, build_batch, micro_batches
from services.learner.config import PolicySection
from services.learner.forward import Forward
from services.learner.journal_rows import PURPOSE_TRAIN
from services.learner.losses.evaluate import loss_of
from services.learner.losses.metrics import PartialMetrics, finish_metrics
from services.learner.losses.prepare import prepare
from services.learner.losses.settings import LossSettings
from services.learner.policy import Policy, load_policy
from services.runtime.errors import BadInputError, InputMissingError
from services.wire.convert import decode_group

BUCKETS = ((0, 0), (1, 2), (3, 8), (9, 32), (33, 128), (129, None))
"""First and last staleness of each bucket, in versions."""
_KEPT = ("rows", "loss", "grad_norm", "weight_mean", "weight_var", "weight_max", "clip_share", "kl_k2", "bias_estimate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """`groups` were trained with a staleness from `first` to `last` versions."""

    first: int
    last: int | None
    groups: tuple[TrainGroup, ...]

    @property
    def name(self) -> str:
        if self.last is None:
            return f"{self.first}+"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One bucket under one loss. `metrics`: those of a step (docs/gepo.md) and `grad_norm` before clipping."""

    label: str
    bucket: str
    groups: int
    metrics: dict[str, float]

    def as_json(self) -> dict[str, object]:
        """JSON has no infinity: a number that is not finite is null."""
        values = {name: self.metrics[name] for name in _KEPT}
        kept = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in values.items()}
        return {"loss_name": self.label, "staleness": self.bucket, "groups": self.groups, **kept}


def read_buckets(journal: Path, most_groups: int) -> list[Bucket]:
    """The last `most_groups` trained groups of each bucket; empty buckets are left out. The run may go on meanwhile.

    Raises InputMissingError (no such journal), BadInputError (not a journal, or nothing trained yet).
    """
    if not journal.is_file():
        raise InputMissingError(f"{journal} is not there: --run takes the state_dir of a learner")
    try:
        connection = sqlite3.connect(f"file:{journal.resolve()}?mode=ro", uri=True)
        try:
            found = [bucket for bucket in _buckets(connection, most_groups) if bucket.groups]
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise BadInputError(f"{journal} cannot be read as a learner's journal ({error})") from None
    if not found:
        raise BadInputError(f"{journal} holds no trained group yet: let the run take a step")
    return found


def _buckets(connection: sqlite3.Connection, most_groups: int) -> Iterator[Bucket]:
    query = (
        "SELECT sampler_id, staleness, payload FROM groups WHERE purpose = ? AND trained_step IS NOT NULL "
        "AND length(payload) > 0 AND staleness BETWEEN ? AND ? ORDER BY id DESC LIMIT ?"
    )
    for first, last in BUCKETS:
        rows = connection.execute(query, (PURPOSE_TRAIN, first, 1 << 60 if last is None else last, most_groups))
        groups = [
            TrainGroup(group=decode_group(payload), sampler_id=sampler_id, staleness=staleness)
            for sampler_id, staleness, payload in rows
        ]
        yield Bucket(first=first, last=last, groups=tuple(groups))


def replay(
    buckets: Sequence[Bucket],
    policy_dir: Path,
    losses: Sequence[tuple[str, LossSettings]],
    *,
    device: str = "auto",
    micro_batch_tokens: int = 16384,
) -> Iterator[Replayed]:
    """Every bucket as one batch under every loss, its gradient taken and thrown away. Raises as `load_policy` does,
    and BadInputError for a group that does not fit the policy or a loss."""
    policy = load_policy(PolicySection(path=policy_dir, device=device))
    for bucket in buckets:
        prompts = (item.group.prompt_token_ids for item in bucket.groups)
        answers = (one.token_ids for item in bucket.groups for one in item.group.completions)
        highest = max(max(ids, default=0) for ids in (*prompts, *answers))
        if highest >= policy.vocab_size:
            raise BadInputError(
                f"a group has token {highest}, beyond the policy's vocabulary: give the run's own policy"
            )
        forward = Forward(policy, bucket.groups[0].group.temperature, autocast=False)
        for label, settings in losses:
            try:
                metrics = _evaluate(policy, forward, bucket.groups, settings, micro_batch_tokens)
            except ValueError as error:
                raise BadInputError(f"the recorded groups do not fit {label}: {error}") from None
            yield Replayed(label=label, bucket=bucket.name, groups=len(bucket.groups), metrics=metrics)


def _evaluate(
    policy: Policy, forward: Forward, groups: Sequence[TrainGroup], settings: LossSettings, micro_batch_tokens: int
) -> dict[str, float]:
    """As `Trainer.step` up to the optimizer."""
    batch = build_batch(groups)
    prepared = prepare(batch.loss_inputs, settings).to(policy.device)
    policy.model.zero_grad(set_to_none=True)
    partials: list[PartialMetrics] = []
    for micro in micro_batches(batch, micro_batch_tokens):
        logprobs_bt, entropy_bt = forward(micro, batch.loss_inputs.mask_BT[micro.index_b, : micro.columns])
        output = loss_of(prepared.rows(micro.index_b.to(policy.device), micro.columns), logprobs_bt, entropy_bt)
        output.loss.backward()
        partials.append(output.metrics)
    gradients = [parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None]
    # In float64: the square of 1e20 is beyond float32, and policies are far apart here.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    policy.model.zero_grad(set_to_none=True)
    return finish_metrics(partials) | {"grad_norm": float(torch.stack(norms).norm())}


def as_table(found: Sequence[Replayed]) -> Table:
    table = Table(title="recorded groups, by staleness when they were trained", title_justify="left")
    for heading in ("staleness", "groups", "loss"):
        table.add_column(heading, overflow="fold")
    for name in _KEPT:
        table.add_column({"loss": "value"}.get(name, name), justify="right")
    for one in found:
        table.add_row(one.bucket, str(one.groups), one.label, *(f"{one.metrics[name]:.4g}" for name in _KEPT))
    return table

"""Builders for tests of the learner's data side: a small run, prompts, and groups as an honest sampler makes them."""

import hashlib
import json
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from services.learner.admission import FormRules
from services.learner.data_plane import DataPlane
from services.learner.data_settings import DataSettings
from services.learner.dataset import Dataset
from services.learner.leases import LeaseRules
from services.learner.pacing import PacingRules
from services.wire.convert import encode_group
from services.wire.types import (
    Completion,
    FinishReason,
    GroupEnvelope,
    Lease,
    LeasePurpose,
    RunSettings,
    SamplingSettings,
    ScoredGroup,
)
from tests.support.journal_rows import RUN

GROUP_SIZE = 2
FORM = FormRules(
    vocab_size=100,
    max_prompt_tokens=16,
    max_completion_tokens=8,
    max_eval_tokens=8,
    temperature=1.0,
    eval_temperature=0.0,
)


def root(version: int) -> str:
    """The root digest of a version in these tests."""
    return f"{version:064x}"


@dataclass(slots=True)
class Clock:
    """Monotonic seconds that stand still until a test moves them."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def dataset(folder: Path, prompts: int = 50) -> Dataset:
    path = folder / "train.jsonl"
    lines = [json.dumps({"prompt": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(prompts)]
    path.write_text("\n".join(lines))
    return Dataset.load(path)


def settings(
    *, groups_per_step: int = 2, max_staleness: int = 1, ttl_s: float = 60.0, session_ttl_s: float = 30.0
) -> DataSettings:
    return DataSettings(
        run_id=RUN,
        seed=7,
        shuffle=False,
        form=FORM,
        pacing=PacingRules(groups_per_step=groups_per_step, max_staleness=max_staleness, ahead=1.0),
        leases=LeaseRules(run_seed=7, group_size=GROUP_SIZE, ttl_s=ttl_s, grace_s=5.0),
        session_ttl_s=session_ttl_s,
        max_age_s=0.0,
    )


async def open_plane(folder: Path, given: DataSettings | None = None, clock: Clock | None = None) -> DataPlane:
    """A restored data plane without a running intake."""
    plane = await DataPlane.open(folder, given or settings(), dataset(folder), clock or Clock(), lambda: 0)
    await plane.restore(None)
    return plane


RUN_SETTINGS = RunSettings(
    model_files=(),
    model_files_sha256="ab" * 32,
    vocab_size=100,
    weights_dtype="BF16",
    group_size=GROUP_SIZE,
    max_staleness=1,
    max_prompt_tokens=16,
    sampling=SamplingSettings(temperature=1.0, max_completion_tokens=8),
    eval_sampling=SamplingSettings(temperature=0.0, max_completion_tokens=8),
    graders=(),
)


def completion(tokens: int = 3, reward: float = 1.0) -> Completion:
    return Completion(
        token_ids=tuple(range(1, tokens + 1)),
        sampler_logprobs=(-0.5,) * tokens,
        reward=reward,
        finish_reason=FinishReason.STOP,
    )


def group_for(lease: Lease, version: int | None = None, reward: float = 1.0, tokens: int = 3) -> ScoredGroup:
    """What an honest sampler answers to a lease, with the oldest policy that the lease allows."""
    evaluation = lease.purpose is LeasePurpose.EVAL
    version = lease.min_policy_version if version is None else version
    return ScoredGroup(
        lease_id=lease.lease_id,
        prompt_id=lease.prompt.prompt_id,
        purpose=lease.purpose,
        policy_version=version,
        policy_root=root(version),
        prompt_token_ids=(1, 2, 3),
        completions=(completion(tokens, reward),) * lease.group_size,
        generation_s=0.1,
        scoring_s=0.1,
        temperature=FORM.eval_temperature if evaluation else FORM.temperature,
        seed=lease.seed,
        eval_round=lease.eval_round,
    )


def envelope(seq: int, group: ScoredGroup | bytes, group_id: str | None = None) -> GroupEnvelope:
    payload = group if isinstance(group, bytes) else encode_group(group)
    return GroupEnvelope(
        seq=seq,
        group_id=group_id or str(uuid.uuid4()),
        content_sha256=hashlib.sha256(payload).digest(),
        payload=payload,
    )


def with_completion(group: ScoredGroup, **changes: object) -> ScoredGroup:
    """The group with its first completion changed."""
    first = replace(group.completions[0], **changes)
    return replace(group, completions=(first, *group.completions[1:]))

"""Scored groups over the small policy's vocabulary."""

import random

from services.learner.batches import TrainGroup
from services.wire.types import Completion, FinishReason, LeasePurpose, ScoredGroup


def completion(draws: random.Random, tokens: int, reward: float) -> Completion:
    return Completion(
        token_ids=tuple(draws.randrange(3, 18) for _ in range(tokens)),
        sampler_logprobs=tuple(-draws.uniform(1.0, 4.0) for _ in range(tokens)),
        reward=reward,
        finish_reason=FinishReason.LENGTH if tokens >= 6 else FinishReason.STOP,
    )


def train_group(seed: int, rows: int = 4, staleness: int = 0) -> TrainGroup:
    """`rows` completions of 1 to 6 tokens whose rewards differ."""
    draws = random.Random(seed)
    return TrainGroup(
        group=ScoredGroup(
            lease_id="l",
            prompt_id="p",
            purpose=LeasePurpose.TRAIN,
            policy_version=0,
            policy_root="0" * 64,
            prompt_token_ids=tuple(draws.randrange(3, 18) for _ in range(draws.randint(2, 5))),
            completions=tuple(completion(draws, draws.randint(1, 6), row % 2) for row in range(rows)),
            generation_s=0.1,
            scoring_s=0.1,
            temperature=1.0,
            seed=seed,
        ),
        sampler_id=f"s{seed % 2}",
        staleness=staleness,
        age_s=float(seed),
    )

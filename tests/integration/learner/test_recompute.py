"""The trainer's own log-probs in place of the samplers', under the versions that drew the tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.learner.batches import TrainGroup
from services.learner.config import OptimizerSection, PolicySection
from services.learner.losses.settings import LossName, LossSettings
from services.learner.policy import Policy, load_policy
from services.learner.trainer import Trainer, TrainerSettings
from services.wire.delta import Weights
from services.wire.torch_bits import to_bits, to_torch
from services.wire.types import Completion, VersionSpan
from tests.support.train_groups import train_group

TEMPERATURE = 0.7


def make(policy_dir: Path, versions: int) -> Trainer:
    settings = TrainerSettings(
        optimizer=OptimizerSection(lr=1e-3),
        loss=LossSettings(name=LossName.GSPO, mask_overlong=False),
        temperature=TEMPERATURE,
        micro_batch_tokens=60,
        autocast=False,
        recompute_versions=versions,
    )
    return Trainer(load_policy(PolicySection(path=policy_dir, device="cpu")), settings)


def scaled(policy: Policy, factor: float) -> Weights:
    return to_bits({name: tensor.detach() * factor for name, tensor in policy.parameters().items()})


def honest(policy_dir: Path, groups: Sequence[TrainGroup], versions: Sequence[Weights]) -> list[TrainGroup]:
    """The groups with the log-probs that a perfect engine would have reported under each token's version."""
    model = load_policy(PolicySection(path=policy_dir, device="cpu")).model
    tables = []
    for weights in versions:
        model.load_state_dict(to_torch(weights), strict=False)
        tables.append({id(one): logprobs(model, item, one) for item in groups for one in item.group.completions})
    made = []
    for item in groups:
        completions = []
        for one in item.group.completions:
            spans = one.version_spans or (
                VersionSpan(end=len(one.token_ids), policy_version=item.group.policy_version),
            )
            starts = (0, *(span.end for span in spans))
            values: list[float] = []
            for start, span in zip(starts, spans, strict=False):
                values += tables[span.policy_version][id(one)][start : span.end]
            completions.append(replace(one, sampler_logprobs=tuple(values)))
        made.append(replace(item, group=replace(item.group, completions=tuple(completions))))
    return made


@torch.no_grad()
def logprobs(model: torch.nn.Module, item: TrainGroup, one: Completion) -> list[float]:
    prompt = item.group.prompt_token_ids
    ids = torch.tensor([[*prompt, *one.token_ids]])
    table = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float() / TEMPERATURE, -1)
    return table.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :].tolist()


def of_version(seed: int, version: int, staleness: int) -> TrainGroup:
    item = train_group(seed, staleness=staleness)
    return replace(item, group=replace(item.group, policy_version=version))


def with_a_swap_inside(item: TrainGroup, later: int) -> TrainGroup:
    completions = [
        replace(
            one,
            version_spans=(
                VersionSpan(end=1, policy_version=item.group.policy_version),
                VersionSpan(end=len(one.token_ids), policy_version=later),
            ),
        )
        if len(one.token_ids) > 1
        else one
        for one in item.group.completions
    ]
    return replace(item, group=replace(item.group, completions=tuple(completions)))


def test_an_engine_that_reports_nonsense_trains_as_a_perfect_one(policy_dir: Path) -> None:
    """Two versions in one batch, one group across a swap: every metric of the step is that of honest log-probs."""
    recomputing, taking = make(policy_dir, versions=3), make(policy_dir, versions=0)
    policy = load_policy(PolicySection(path=policy_dir, device="cpu"))
    versions = [scaled(policy, 1.1), scaled(policy, 1.0)]
    groups = [of_version(0, 0, 1), of_version(1, 1, 0), with_a_swap_inside(of_version(2, 0, 1), later=1)]
    for number, weights in enumerate(versions):
        recomputing.published(number, weights)
    ours = recomputing.step(groups)
    theirs = taking.step(honest(policy_dir, groups, versions))
    nonsense = make(policy_dir, versions=0).step(groups)
    assert ours.metrics.pop("recomputed_share") == 1.0
    for name in ("loss", "grad_norm", "weight_mean", "weight_var", "kl_k3"):
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-3, abs=1e-6)
    assert abs(nonsense.metrics["weight_mean"] - theirs.metrics["weight_mean"]) > 0.1
    assert ours.mismatch["s1"].mean > 0.5, "the engine's own numbers are what the mismatch is about"
    assert theirs.mismatch["s1"].mean < 0.02


def test_tokens_of_versions_that_are_not_held_keep_the_samplers_numbers(policy_dir: Path) -> None:
    trainer = make(policy_dir, versions=2)
    policy = load_policy(PolicySection(path=policy_dir, device="cpu"))
    for number in range(4):
        trainer.published(number, scaled(policy, 1.0))
    groups = [of_version(0, 0, 3), of_version(1, 3, 0)]
    tokens = [sum(len(one.token_ids) for one in item.group.completions) for item in groups]
    assert trainer.step(groups).metrics["recomputed_share"] == pytest.approx(tokens[1] / sum(tokens))

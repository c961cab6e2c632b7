"""One optimizer step: what it depends on, and what it must not depend on."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.learner.batches import TrainGroup
from services.learner.config import OptimizerSection, PolicySection
from services.learner.losses.settings import LossName, LossSettings
from services.learner.policy import Policy, load_policy
from services.learner.trainer import AGE_BINS_S, Trainer, TrainerSettings
from services.runtime.errors import ConfigError
from tests.support.train_groups import train_group

GROUPS = [train_group(seed, staleness=seed % 3) for seed in range(4)]


def make(policy_dir: Path, budget: int = 10_000, loss: LossName = LossName.GEPO, **optimizer: float) -> Trainer:
    settings = TrainerSettings(
        optimizer=OptimizerSection.model_validate({"lr": 1e-3, **optimizer}),
        loss=LossSettings(name=loss, mask_overlong=False),
        temperature=0.7,
        micro_batch_tokens=budget,
        autocast=False,
    )
    return Trainer(load_policy(PolicySection(path=policy_dir, device="cpu")), settings)


def masters(trainer: Trainer) -> dict[str, torch.Tensor]:
    policy: Policy = trainer._policy  # pyright: ignore[reportPrivateUsage]
    return {name: tensor.detach().clone() for name, tensor in policy.parameters().items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("loss", [LossName.GEPO, LossName.GSPO, LossName.GRPO])
def test_loss_and_gradient_do_not_depend_on_the_cut_into_micro_batches(policy_dir: Path, loss: LossName) -> None:
    results = [make(policy_dir, budget, loss).step(GROUPS).metrics for budget in (1, 40, 10_000)]
    for other in results[1:]:
        assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-5, abs=1e-7)
        assert other["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-4)
        assert other["weight_var"] == pytest.approx(results[0]["weight_var"], rel=1e-4, abs=1e-9)


def test_rewards_that_the_loss_cannot_take_are_a_fault_of_the_configuration(policy_dir: Path) -> None:
    first, *others = GROUPS[0].group.completions
    group = replace(GROUPS[0].group, completions=(replace(first, reward=2.0), *others))
    with pytest.raises(ConfigError, match=r"do not fit \[loss\]: .*between 0 and 1.* move journal"):
        make(policy_dir, loss=LossName.BNPO).step([replace(GROUPS[0], group=group), *GROUPS[1:]])


def test_a_step_changes_the_masters_and_says_so(policy_dir: Path) -> None:
    trainer = make(policy_dir)
    before = masters(trainer)
    result = trainer.step(GROUPS)
    assert result.applied
    assert largest_difference(before, masters(trainer)) > 0
    metrics = result.metrics
    assert metrics["reward_mean"] == pytest.approx(0.5)
    assert (metrics["staleness_max"], metrics["staleness_0"], metrics["staleness_1"]) == (2.0, 2.0, 1.0)
    assert metrics["completion_tokens"] == sum(len(c.token_ids) for g in GROUPS for c in g.group.completions)
    assert metrics["age_max_s"] == 3.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_ages_fall_into_bins_that_hold_their_lower_end(policy_dir: Path) -> None:
    ages = (0.0, 0.99, 1.0, 59.9, 60.0, 1e6)
    groups = [replace(train_group(seed), age_s=age) for seed, age in enumerate(ages)]
    metrics = make(policy_dir).step(groups).metrics
    assert [metrics[f"age_{first}s"] for first in AGE_BINS_S] == [2.0, 1.0, 1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("loss", list(LossName))
def test_a_step_reports_every_metric_whatever_the_loss(policy_dir: Path, loss: LossName) -> None:
    metrics = make(policy_dir, loss=loss).step(GROUPS).metrics
    weights = {f"weight_{name}" for name in ("mean", "var", "min", "p01", "p50", "p99", "max", "ess", "ess_share")}
    divergences = {"kl_k1", "kl_k2", "kl_k3", "entropy", "e_over_mean_q", "bias_estimate"}
    batch = {"clip_share", "grad_norm", "advantage_mean", "staleness_0", "staleness_mean", "age_0s", "age_mean_s"}
    assert weights | divergences | batch <= metrics.keys()
    assert metrics["entropy"] > 0
    assert metrics["grad_norm"] > 0
    assert 0 < metrics["weight_ess_share"] <= 1


def test_the_temperature_divides_the_learners_logits(policy_dir: Path) -> None:
    """Groups written by this very policy at this temperature have ratio 1: no weight differs from q / E."""
    trainer = make(policy_dir, loss=LossName.GSPO)
    policy: Policy = trainer._policy  # pyright: ignore[reportPrivateUsage]
    honest: list[TrainGroup] = []
    for item in GROUPS:
        completions = []
        for one in item.group.completions:
            ids = torch.tensor([[*item.group.prompt_token_ids, *one.token_ids]])
            with torch.no_grad():
                table = torch.log_softmax(policy.model(input_ids=ids).logits[0, :-1].float() / 0.7, -1)
            picked = table.gather(1, ids[0, 1:, None]).squeeze(1)[len(item.group.prompt_token_ids) - 1 :]
            completions.append(replace(one, sampler_logprobs=tuple(picked.tolist())))
        honest.append(replace(item, group=replace(item.group, completions=tuple(completions)), staleness=0))
    result = trainer.step(honest)
    assert result.metrics["weight_min"] == pytest.approx(1.0, abs=1e-4)
    assert result.metrics["weight_max"] == pytest.approx(1.0, abs=1e-4)
    assert {name: one.mean < 1e-4 for name, one in result.mismatch.items()} == {"s0": True, "s1": True}


def test_a_gradient_that_is_not_finite_leaves_the_masters_alone(policy_dir: Path) -> None:
    trainer = make(policy_dir)
    policy: Policy = trainer._policy  # pyright: ignore[reportPrivateUsage]
    hook = policy.parameters()["model.norm.weight"].register_hook(lambda gradient: gradient * math.nan)
    before = masters(trainer)
    result = trainer.step(GROUPS)
    hook.remove()
    assert not result.applied
    assert trainer.steps_taken == 0
    assert largest_difference(before, masters(trainer)) == 0.0
    assert trainer.step(GROUPS).applied


def test_warm_up_raises_the_learning_rate_in_equal_parts(policy_dir: Path) -> None:
    trainer = make(policy_dir, warmup_steps=4)
    rates = [trainer.step(GROUPS).metrics["lr"] for _ in range(5)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])

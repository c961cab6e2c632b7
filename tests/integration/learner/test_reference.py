"""The KL regulariser that pulls to the policy that the run began with."""

from pathlib import Path

import pytest
import torch

from services.learner.config import OptimizerSection, PolicySection
from services.learner.losses.settings import KlEstimator, KlTarget, LossName, LossSettings
from services.learner.policy import load_policy
from services.learner.trainer import Trainer, TrainerSettings
from tests.support.train_groups import train_group

GROUPS = [train_group(seed, staleness=0) for seed in range(4)]
TEMPERATURE = 0.7


def make(policy_dir: Path, kl_beta: float, budget: int = 60) -> Trainer:
    loss = LossSettings(
        name=LossName.GRPO,
        mask_overlong=False,
        kl_beta=kl_beta,
        kl_estimator=KlEstimator.K2,
        kl_target=KlTarget.REFERENCE,
    )
    settings = TrainerSettings(
        optimizer=OptimizerSection(lr=1e-3),
        loss=loss,
        temperature=TEMPERATURE,
        micro_batch_tokens=budget,
        autocast=False,
    )
    section = PolicySection(path=policy_dir, device="cpu")
    return Trainer(load_policy(section), settings, load_policy(section) if loss.wants_reference else None)


@torch.no_grad()
def squared_distance(trainer: Trainer, start: Trainer) -> float:
    """k2 of the two policies on the groups: mean over tokens of a row, then over rows."""
    rows: list[float] = []
    for item in GROUPS:
        prompt = item.group.prompt_token_ids
        for one in item.group.completions:
            ids = torch.tensor([[*prompt, *one.token_ids]])
            found = [
                torch.log_softmax(owner._policy.model(input_ids=ids).logits[0, :-1].float() / TEMPERATURE, -1)
                .gather(1, ids[0, 1:, None])
                .squeeze(1)[len(prompt) - 1 :]
                for owner in (trainer, start)
            ]
            rows.append(float(((found[0] - found[1]).square() / 2).mean()))
    return sum(rows) / len(rows)


def test_at_the_start_there_is_nothing_to_pull_to(policy_dir: Path) -> None:
    with_kl, without = make(policy_dir, 10.0).step(GROUPS).metrics, make(policy_dir, 0.0).step(GROUPS).metrics
    assert with_kl["loss"] == pytest.approx(without["loss"], abs=1e-9)
    assert with_kl["grad_norm"] == pytest.approx(without["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_the_loss_grows_by_beta_times_k2_to_the_first_policy(policy_dir: Path, budget: int) -> None:
    start, trainer = make(policy_dir, 0.0), make(policy_dir, 3.0, budget)
    plain = make(policy_dir, 0.0)
    trainer.step(GROUPS)
    plain.step(GROUPS)  # the same step: the regulariser has no gradient yet
    distance = squared_distance(trainer, start)
    assert distance > 1e-6
    grown = trainer.step(GROUPS).metrics["loss"] - plain.step(GROUPS).metrics["loss"]
    assert grown == pytest.approx(3.0 * distance, rel=1e-3)


def test_a_large_beta_keeps_the_policy_near_the_reference(policy_dir: Path) -> None:
    start = make(policy_dir, 0.0)
    free, held = make(policy_dir, 0.0), make(policy_dir, 100.0)
    for _ in range(4):
        free.step(GROUPS)
        held.step(GROUPS)
    assert squared_distance(held, start) < 0.5 * squared_distance(free, start)

"""Training, snapshots and checkpoints beside the CPU: no tensor is on the wrong side, and the numbers are the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.lab.tiny_policy import character_tokenizer
from services.learner.checkpoint import Checkpoints, Position
from services.learner.config import OptimizerSection, PolicySection
from services.learner.losses.settings import KlTarget, LossName, LossSettings
from services.learner.policy import Policy, load_policy
from services.learner.snapshots import Snapshots
from services.learner.trainer import Trainer, TrainerSettings
from services.wire.delta import root_of
from tests.support.second_device import SECOND, moved, on_second_device
from tests.support.tiny_families import save_family
from tests.support.train_groups import train_group

GROUPS = [train_group(seed, staleness=seed % 2) for seed in range(4)]
SETTINGS = TrainerSettings(
    optimizer=OptimizerSection.model_validate({"lr": 1e-3}),
    loss=LossSettings(mask_overlong=False),
    temperature=0.7,
    micro_batch_tokens=40,
    autocast=False,
)
_OF_A_CLOCK = {"step_s", "tokens_per_s"}


def load(directory: Path, **policy: object) -> Policy:
    return load_policy(PolicySection.model_validate({"path": directory, "device": "cpu", **policy}))


def assert_same_steps(directory: Path, settings: TrainerSettings, **policy: object) -> None:
    """Of two steps there and two on the CPU the second reports the same."""
    reports: list[dict[str, float]] = []
    for device in ("cpu", SECOND.type):
        with on_second_device():
            models = [load(directory, **policy) for _ in range(2)]
            trained, reference = models if device == "cpu" else map(moved, models)
            trainer = Trainer(trained, settings, reference if settings.loss.wants_reference else None)
            trainer.published(0, trained.wire_weights())
            results = [trainer.step(GROUPS) for _ in range(2)]
        assert all(result.applied for result in results)
        reports += [result.metrics for result in results[1:]]
    assert trained.device == SECOND
    here, there = ({k: v for k, v in report.items() if k not in _OF_A_CLOCK} for report in reports)
    assert there == pytest.approx(here, rel=1e-4, abs=1e-6)


def test_tensors_of_two_devices_do_not_mix_there() -> None:
    with on_second_device():
        here, there = torch.ones(3), torch.ones(3, device=SECOND)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.add(here, there)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.gather(here, 0, there.long())
        assert (there + here.to(SECOND)).cpu().tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("loss", list(LossName))
def test_a_step_there_is_the_step_on_the_cpu(policy_dir: Path, loss: LossName) -> None:
    assert_same_steps(policy_dir, replace(SETTINGS, loss=LossSettings(name=loss, mask_overlong=False)))


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2"])
def test_so_it_is_for_other_families(tmp_path: Path, family: str) -> None:
    save_family(tmp_path, family, character_tokenizer())
    assert_same_steps(tmp_path, SETTINGS)


def test_so_it_is_with_a_reference_recomputed_log_probs_and_checkpointed_layers(policy_dir: Path) -> None:
    loss = LossSettings(mask_overlong=False, kl_beta=0.1, kl_target=KlTarget.REFERENCE)
    assert_same_steps(policy_dir, replace(SETTINGS, loss=loss, recompute_versions=2), gradient_checkpointing=True)


def test_snapshots_by_difference_there_are_the_whole_copies(policy_dir: Path) -> None:
    with on_second_device():
        policy = moved(load(policy_dir))
        snapshots = Snapshots(policy, on_device=True)
        roots: list[str] = []
        for step in range(3):
            snapshots.take()
            weights, comparison = snapshots.finish()
            assert (comparison is None) == (step == 0)
            assert root_of(weights) == root_of(policy.wire_weights())
            roots.append(root_of(weights))
            with torch.no_grad():
                for tensor in policy.model.parameters():
                    tensor.mul_(1.01)
    assert len(set(roots)) == 3


def test_training_goes_on_there_bit_for_bit_after_a_restore(tmp_path: Path, policy_dir: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    with on_second_device():
        policies = [moved(load(policy_dir)) for _ in range(2)]
        trainers = [Trainer(policy, SETTINGS) for policy in policies]
        trainers[0].step(GROUPS[:2])
        position = Position(step=1, version=1, root="0" * 64, trainer_steps=1, data={}, counters={})
        checkpoints.write(position, policies[0], trainers[0])
        assert checkpoints.restore(policies[1], trainers[1]) == position
        for trainer in trainers:
            assert trainer.step(GROUPS[2:]).applied
        assert root_of(policies[0].wire_weights()) == root_of(policies[1].wire_weights())

"""What a step hands to publishing; the device's path on the CPU, for want of a GPU."""

from pathlib import Path

import torch

from services.learner.config import PolicySection
from services.learner.policy import load_policy
from services.learner.snapshots import Snapshots
from services.wire.delta import root_of


def test_snapshots_by_difference_are_the_whole_copies(policy_dir: Path) -> None:
    policy = load_policy(PolicySection(path=policy_dir, device="cpu"))
    snapshots = Snapshots(policy, on_device=True)
    first, comparison = snapshots.take()
    assert comparison is None
    roots = [root_of(first)]
    base = first
    for step in range(3):
        with torch.no_grad():
            for tensor in policy.model.parameters():
                tensor += 1e-3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step))
        weights, comparison = snapshots.take()
        assert comparison is not None
        assert comparison.base is base
        assert root_of(weights) == root_of(policy.wire_weights())
        roots.append(root_of(weights))
        base = weights
    assert root_of(first) == roots[0], "an earlier snapshot does not change"
    assert len(set(roots)) == 4


def test_without_a_device_every_snapshot_is_a_copy(policy_dir: Path) -> None:
    policy = load_policy(PolicySection(path=policy_dir, device="cpu"))
    weights, comparison = Snapshots(policy, on_device=False).take()
    assert comparison is None
    assert root_of(weights) == root_of(policy.wire_weights())

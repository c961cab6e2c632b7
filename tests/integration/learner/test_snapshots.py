"""What a step hands to publishing; the device's path on the CPU, for want of a GPU."""

from pathlib import Path

import torch

from services.learner.config import PolicySection
from services.learner.policy import load_policy
from services.learner.snapshots import Snapshots
from services.wire.delta import Weights, root_of


def test_snapshots_by_difference_are_the_whole_copies(policy_dir: Path) -> None:
    policy = load_policy(PolicySection(path=policy_dir, device="cpu"))
    snapshots = Snapshots(policy, on_device=True)
    snapshots.take()
    first, comparison = snapshots.finish()
    assert comparison is None
    roots = [root_of(first)]
    base = first
    for step in range(3):
        with torch.no_grad():
            for tensor in policy.model.parameters():
                tensor += 1e-3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step))
        snapshots.take()
        expected = root_of(policy.wire_weights())
        with torch.no_grad():  # the next step goes on meanwhile
            saved = [tensor.clone() for tensor in policy.model.parameters()]
            for tensor in policy.model.parameters():
                tensor.fill_(9.0)
            weights, comparison = snapshots.finish()
            for tensor, value in zip(policy.model.parameters(), saved, strict=True):
                tensor.copy_(value)
        assert comparison is not None
        assert comparison.base is base
        assert root_of(weights) == expected
        roots.append(root_of(weights))
        base = weights
    assert root_of(first) == roots[0], "an earlier snapshot does not change"
    assert len(set(roots)) == 4


def test_without_a_device_every_snapshot_is_a_copy(policy_dir: Path) -> None:
    policy = load_policy(PolicySection(path=policy_dir, device="cpu"))
    snapshots = Snapshots(policy, on_device=False)
    held: dict[str, Weights] = {}
    for _ in range(4):
        with torch.no_grad():
            next(policy.model.parameters()).mul_(1.5)
        snapshots.take()
        weights, comparison = snapshots.finish()
        assert comparison is None
        assert root_of(weights) == root_of(policy.wire_weights())
        held = {
            **dict(list(held.items())[-1:]),
            root_of(weights): weights,
        }  # as publishing does: the base and the newest
        assert [root_of(weights) for weights in held.values()] == list(held), "an earlier snapshot does not change"

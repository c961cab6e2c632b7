"""The weights of each step in wire format, for publishing: what the next step waits for, and all that it waits for.

On a GPU the bits of the version before stay there, so that only what changed crosses the bus; the host's copy of the
new version is its copy of the old one with these changes. Elsewhere, and for the first version, all bits are copied.
"""

import torch

from services.learner.policy import Policy
from services.wire.delta import Weights
from services.wire.delta.codec import Comparison
from services.wire.torch_scan import DeviceBits, compare, device_bits


class Snapshots:
    """`on_device` keeps 2 bytes per parameter on the policy's device, and 4 while a version is encoded."""

    def __init__(self, policy: Policy, *, on_device: bool) -> None:
        self._policy = policy
        self._on_device = on_device
        self._last: tuple[Weights, DeviceBits] | None = None

    def take(self) -> tuple[Weights, Comparison | None]:
        """Fresh memory, so that the next step may go on; and how it compares with what was taken before, where that is
        known. Blocks."""
        if not self._on_device:
            return self._policy.wire_weights(), None
        if self._last is None:
            weights: Weights = self._policy.wire_weights()
            self._last = (weights, self._bits(weights))
            return weights, None
        base, base_bits = self._last
        new_bits = self._bits(base)
        comparison = compare(base, base_bits, new_bits)
        self._last = (comparison.new, new_bits)
        return comparison.new, comparison

    def _bits(self, weights: Weights) -> DeviceBits:
        return device_bits(self._policy.parameters(), list(weights), torch.bfloat16)

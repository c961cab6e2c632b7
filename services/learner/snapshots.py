"""The weights of each step in wire format, for publishing: what the next step waits for, and all that it waits for.

    take ─► bits that training no longer changes ─► finish, beside the next step ─► weights on the host

On a GPU the bits of the version before stay there, so that only what changed crosses the bus; the host's copy of the
new version is its copy of the old one with these changes, and is made by `finish`. Elsewhere, and for the first
version, `take` copies all bits to the host.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from services.learner.policy import Policy
from services.wire.delta import Weights
from services.wire.delta.codec import Comparison
from services.wire.delta.memory import Memory
from services.wire.delta.sparse import Changes
from services.wire.torch_scan import DeviceBits, compare, comparison_of, device_bits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Version:
    """The newest that is on the host, and on the device where comparing is done there."""

    weights: Weights
    bits: DeviceBits | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Taken:
    """On the device, and how it differs from the newest that is on the host."""

    bits: DeviceBits
    found: Mapping[str, Changes]


class Snapshots:
    """One `take`, one `finish`, in turn. `on_device` keeps 2 bytes per parameter on the policy's device, and 4 while a
    version is encoded. `workers` are threads of `finish`."""

    def __init__(self, policy: Policy, *, on_device: bool, workers: int = 1) -> None:
        self._policy = policy
        self._on_device = on_device
        self._stream = torch.cuda.Stream(policy.device) if on_device and policy.device.type == "cuda" else None
        self._workers = workers
        self._memory = Memory()
        self._newest: _Version | None = None
        self._taken: _Taken | None = None

    def take(self) -> None:
        """Memory that nobody holds, so that the next step may go on. Blocks."""
        newest = self._newest
        if newest is None or newest.bits is None:
            weights = self._policy.wire_weights(self._memory)
            self._newest = _Version(weights=weights, bits=self._bits(weights) if self._on_device else None)
        else:
            bits = self._bits(newest.weights)
            self._taken = _Taken(bits=bits, found=compare(newest.bits, bits))

    def finish(self) -> tuple[Weights, Comparison | None]:
        """What was taken, and how it compares with what was taken before, where that is known. Blocks; while it does,
        training may go on."""
        newest, taken, self._taken = self._newest, self._taken, None
        assert newest is not None, "take first"
        if taken is None or newest.bits is None:
            return newest.weights, None
        comparison = comparison_of(
            newest.weights,
            newest.bits,
            taken.found,
            workers=self._workers,
            stream=self._stream,
            memory=self._memory,
        )
        self._newest = _Version(weights=comparison.new, bits=taken.bits)
        return comparison.new, comparison

    def _bits(self, weights: Weights) -> DeviceBits:
        return device_bits(self._policy.parameters(), list(weights), torch.bfloat16)

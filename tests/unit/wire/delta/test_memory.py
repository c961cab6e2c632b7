"""Memory of versions that nobody holds any more is used for the next one, and no other."""

import numpy as np
import pytest
import torch

from services.wire.delta.memory import Memory
from services.wire.torch_bits import to_bits, to_torch

STATE = {"a": torch.arange(5000.0), "b": torch.ones(7, 3), "scalar": torch.tensor(2.0)}


def address(array: np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]) -> int:
    return array.__array_interface__["data"][0]


def test_the_memory_of_a_version_that_nobody_holds_is_used_again() -> None:
    memory = Memory()
    first = to_bits(STATE, memory=memory)
    place = address(first["a"].bits)
    del first
    assert address(to_bits(STATE, memory=memory)["a"].bits) == place


@pytest.mark.parametrize("kept", ["all of it", "one tensor", "a view", "a torch tensor"])
def test_what_somebody_holds_is_left_alone(kept: str) -> None:
    memory = Memory()
    weights = to_bits(STATE, memory=memory)
    held: object = {
        "all of it": weights,
        "one tensor": weights["a"],
        "a view": weights["a"].bits[3000:].view(np.uint8),
        "a torch tensor": to_torch(weights)["a"][10:],
    }[kept]
    place = address(weights["a"].bits)
    del weights
    others = [to_bits(STATE, memory=memory) for _ in range(3)]
    assert place not in [address(other["a"].bits) for other in others]
    del held
    assert address(to_bits(STATE, memory=memory)["a"].bits) == place


def test_memory_of_another_size_is_given_up() -> None:
    memory = Memory()
    memory.take(1000)
    assert memory.take(2000).size == 2000
    assert memory.take(0).size == 1

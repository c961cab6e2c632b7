"""Memory of versions that nobody holds any more is used for the next one, and no other."""

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import pytest
import torch

from services.wire.delta import Weights, iter_encode
from services.wire.delta.memory import Memory
from services.wire.delta.tensors import digest_jobs
from services.wire.torch_bits import to_bits, to_torch

STATE = {"a": torch.arange(5000.0), "b": torch.ones(7, 3), "scalar": torch.tensor(2.0), "empty": torch.zeros(0)}


def address(array: np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]) -> int:
    return array.__array_interface__["data"][0]


def test_the_memory_of_a_version_that_nobody_holds_is_used_again() -> None:
    memory = Memory()
    first = to_bits(STATE, memory=memory)
    place = address(first["a"].bits)
    del first
    assert address(to_bits(STATE, memory=memory)["a"].bits) == place


def begun(parts: Iterator[bytes]) -> Iterator[bytes]:
    next(parts)
    return parts


HOLDERS: dict[str, Callable[[Weights], object]] = {
    "all of it": lambda weights: weights,
    "one tensor": lambda weights: weights["a"],
    "a tensor without elements": lambda weights: weights["empty"].bits,
    "a view": lambda weights: weights["a"].bits[3000:].view(np.uint8),
    "views of views": lambda weights: weights["a"].bits.view(np.uint8).reshape(-1, 2)[9:].reshape(-1)[4:][::2],
    "an array that need not be copied": lambda weights: np.ascontiguousarray(weights["a"].bits[5:]).astype(
        np.uint16, copy=False
    ),
    "a buffer": lambda weights: memoryview(cast("bytes", weights["a"].bits))[7:],
    "an array over a buffer": lambda weights: np.frombuffer(weights["a"].bits, np.uint8)[7:],
    "a torch tensor": lambda weights: to_torch(weights)["a"][10:],
    "an array over a torch tensor": lambda weights: to_torch(weights)["a"].view(torch.int16)[10:].numpy()[1:],
    "jobs that will hash it": lambda weights: digest_jobs(weights, ["a"]),
    "an encoder that has not begun": lambda weights: iter_encode(None, weights, run_id="run", target_version=1),
    "an encoder that was left": lambda weights: begun(iter_encode(None, weights, run_id="run", target_version=1)),
    "the base of a delta": lambda weights: iter_encode(
        weights, to_bits(STATE), run_id="run", base_version=0, target_version=1, root_last=True
    ),
    "the target of a delta": lambda weights: iter_encode(
        to_bits(STATE), weights, run_id="run", base_version=0, target_version=1, root_last=True
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_holds_is_left_alone(holder: str) -> None:
    memory = Memory()
    weights = to_bits(STATE, memory=memory)
    held = HOLDERS[holder](weights)
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

"""State dicts become bits and come back the same."""

import pytest
import torch

from services.runtime.errors import InvalidWeightsError
from services.wire.delta import root_of
from services.wire.torch_bits import DTYPES, to_bits, to_torch


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    data = (
        torch.arange(256, dtype=torch.uint8) if dtype != torch.bool else torch.tensor([0, 1] * 128, dtype=torch.uint8)
    )
    tensor = data.view(dtype).reshape(2, -1)
    back = to_torch(to_bits({"w": tensor}, None))["w"]
    assert (back.dtype, back.shape, raw(back)) == (tensor.dtype, tensor.shape, raw(tensor))


def test_floating_tensors_are_cast_and_others_are_not() -> None:
    state = {"w": torch.randn(3, 4), "steps": torch.tensor(3)}
    back = to_torch(to_bits(state))
    assert torch.equal(back["w"], state["w"].to(torch.bfloat16))
    assert back["steps"].dtype == torch.int64


def test_a_snapshot_shares_nothing_with_the_model() -> None:
    weight = torch.randn(4).to(torch.bfloat16)
    bits = to_bits({"w": weight})
    root = root_of(bits)
    weight.zero_()
    assert root_of(bits) == root


def test_tied_weights_keep_their_first_name_and_transposed_views_their_order() -> None:
    weight = torch.randn(3, 2)
    bits = to_bits({"embed": weight, "head": weight, "turned": weight.t()}, None)
    assert list(bits) == ["embed", "turned"]
    assert torch.equal(to_torch(bits)["turned"], weight.t())


def test_read_only_weights_are_copied() -> None:
    bits = to_bits({"w": torch.ones(3)})
    bits["w"].bits.flags.writeable = False
    to_torch(bits)["w"].zero_()
    assert bits["w"].bits.tolist() == [0x3F80] * 3


def test_types_that_do_not_travel_are_refused() -> None:
    with pytest.raises(InvalidWeightsError, match="complex128"):
        to_bits({"w": torch.ones(2, dtype=torch.complex128)})

"""Weights into a transformers model: everything is checked before anything is changed."""

import torch
from transformers import PreTrainedModel

from services.runtime.errors import InvalidWeightsError
from services.wire.delta import Weights
from services.wire.torch_bits import to_torch


def pair_tensors(model: PreTrainedModel, weights: Weights) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where each tensor goes, checked: every parameter of the model (a tied one under any of its names), nothing else.

    Raises InvalidWeightsError.
    """
    ours: dict[str, torch.Tensor] = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, value in to_torch(weights).items():
        tensor = ours.get(name)
        if tensor is None or tensor.shape != value.shape:
            shapes = "" if tensor is None else f": {list(value.shape)}, where the model has {list(tensor.shape)}"
            raise InvalidWeightsError(f"the tensor {name[:80]} does not fit the model{shapes}")
        pairs.append((tensor, value))
    given = {id(tensor) for tensor, _ in pairs}
    missing = [name for name, tensor in model.named_parameters() if id(tensor) not in given]
    if missing:
        raise InvalidWeightsError(f"{len(missing)} tensors are missing, {missing[0]} first: fetch a keyframe")
    return pairs


@torch.no_grad()
def copy_into_model(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """In place, converted to the model's own type, so that tied tensors stay tied."""
    for tensor, value in pairs:
        tensor.copy_(value)

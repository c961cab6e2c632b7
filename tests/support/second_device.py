"""A device beside the CPU for machines that have no GPU: what would fail on a GPU because tensors are on the wrong side
fails here. It computes on the CPU, and bears the name of torch's meta device, which autograd knows everywhere.

    with on_second_device():  policy = moved(load_policy(…))  ─► Trainer, Snapshots, … as on a GPU
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from services.learner.policy import Policy

Function = Callable[..., object]
SECOND = torch.device("meta")
_real_autocast = torch.autocast
_BETWEEN_DEVICES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class SecondDeviceTensor(torch.Tensor):
    """Its values are `held`, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "SecondDeviceTensor":
        tensor = cls._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=SECOND,
        )
        tensor.held = held
        return cast("SecondDeviceTensor", tensor)

    def tolist(self) -> list[object]:  # torch's own takes no subclass
        return cast("list[object]", self.held.tolist())

    @classmethod
    def __torch_dispatch__(
        cls, func: Function, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        del types
        return _run(func, args, kwargs or {})


class _SecondDevice(TorchDispatchMode):
    """Makes what is asked for there, too."""

    def __torch_dispatch__(
        self, func: Function, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        del types
        return _run(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """torch.tensor is not dispatched."""

    def __torch_function__(
        self, func: Function, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        del types
        words = kwargs or {}
        if func is torch.tensor and words.get("device") == SECOND:
            return cast("torch.Tensor", func(*args, **{**words, "device": "cpu"})).to(SECOND)
        return func(*args, **words)


def _run(func: Function, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Raises RuntimeError where tensors of both devices meet, but for numbers (0 dimensions) and copies."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, SecondDeviceTensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, SecondDeviceTensor) and tensor.dim() > 0]
    if there and here and func not in _BETWEEN_DEVICES:
        raise RuntimeError(f"{func} was given tensors of two devices")
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if there if device is None else torch.device(cast("str", device)) == SECOND:
        out = tree_map(_wrapped, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def _inner(value: object) -> object:
    return value.held if isinstance(value, SecondDeviceTensor) else value


def _wrapped(value: object) -> object:
    return SecondDeviceTensor(value) if isinstance(value, torch.Tensor) else value


def _autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> torch.autocast:
    """torch has none of the name that the device bears."""
    return _real_autocast("cpu" if device_type == SECOND.type else device_type, dtype, enabled)


@contextmanager
def on_second_device() -> Generator[None]:
    """`device=SECOND` is the second device within, in this thread. Autocast leaves its tensors alone."""
    with _Constants(), _SecondDevice(), patch.object(torch, "autocast", _autocast):
        yield


def moved(policy: Policy) -> Policy:
    """The policy on the second device. In place."""
    move(policy.model)
    return replace(policy, device=SECOND)


def move(model: torch.nn.Module) -> None:
    """To the second device; parameters that are tied stay tied."""
    parameters: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            there = torch.nn.Parameter(SecondDeviceTensor(parameter.detach()), parameter.requires_grad)
            module.register_parameter(name, parameters.setdefault(id(parameter), there))
        for name, buffer in list(module.named_buffers(recurse=False)):
            persistent = name not in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
            module.register_buffer(name, SecondDeviceTensor(buffer), persistent)

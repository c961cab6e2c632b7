"""Inside vLLM's workers: new weights from a file of ours into the running model."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import safe_open


class _Runner(Protocol):
    def get_model(self) -> torch.nn.Module: ...

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None: ...


class _Packing(Protocol):
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...


class _Experts(Protocol):
    moe_kernel: object | None


class ReloadExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`), hence no __init__ and names that cannot collide."""

    model_runner: _Runner

    def heterorl_reload(self, path: str) -> None:
        """Loads the tensors of a .safetensors file: complete fused groups, already verified.

        vLLM itself checks nothing: an unknown name leaves a layer without memory. Any error here means that the model
        may be a mix, and that the process must end.
        """
        model = self.model_runner.get_model()
        with _experts_packed_anew(model):
            self.model_runner.reload_weights(weights_iterator=_tensors(Path(path)))
        _pack_tied_head(model)
        for name, tensor in model.named_parameters():
            if tensor.is_meta:
                raise RuntimeError(f"{name} has no values after the reload")


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield name, cast("torch.Tensor", file.get_tensor(name))


@contextmanager
def _experts_packed_anew(model: torch.nn.Module) -> Generator[None]:
    """On a CPU the experts of a block are packed where their kernel is made, which a reload leaves out where there is
    one: it would put unpacked values into the packed memory, and log-probs would be silently wrong."""
    kernels: list[tuple[_Experts, object]] = []
    for module in model.modules():
        method = cast("_Experts | None", getattr(module, "quant_method", None))
        if getattr(method, "moe_kernel", None) is None or any(not tensor.is_cpu for tensor in module.parameters()):
            continue
        assert method is not None
        kernels.append((method, method.moe_kernel))
        method.moe_kernel = None
    yield
    for method, kernel in kernels:
        if method.moe_kernel is None:  # of a block that this reload did not touch
            method.moe_kernel = kernel


def _pack_tied_head(model: torch.nn.Module) -> None:
    """On a CPU a head keeps a packed copy of its matrix, and a reload of the embedding that it is tied to does not
    touch that copy: log-probs would be silently wrong."""
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    for module in model.modules():
        packing = cast("_Packing | None", getattr(module, "quant_method", None))
        if (
            packing is not None
            and hasattr(module, "cpu_linear")
            and owners.get(id(getattr(module, "weight", None))) == 2
        ):
            packing.process_weights_after_loading(module)

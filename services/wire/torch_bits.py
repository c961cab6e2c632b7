"""Between torch state dicts and bit patterns. Imported by learner and sampler only: the codec itself knows no torch."""

from collections.abc import Mapping

import torch

from services.runtime.errors import InvalidWeightsError
from services.wire.delta.decode import allocate
from services.wire.delta.memory import Memory
from services.wire.delta.sparse import SIGNED
from services.wire.delta.tensors import BitTensor, TensorForm, Weights, check_form

DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
CARRIER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_bits(
    state_dict: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = torch.bfloat16,
    memory: Memory | None = None,
) -> dict[str, BitTensor]:
    """A snapshot: floating tensors cast to `dtype` (None: as they are), copied to the CPU, into one block of memory
    (from `memory`, if given).

    Nothing in the result shares memory with the model, so that training may go on. Of tensors that are one in memory
    (tied weights) only the first name is kept. Raises InvalidWeightsError for a name or type that does not travel.
    """
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[str, int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in state_dict.items():
        identity = (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and tensor.data_ptr() and identity in seen:
            continue
        seen.add(identity)
        kept[name] = tensor.detach()
    weights = allocate([_form_of(name, tensor, dtype) for name, tensor in kept.items()], memory)
    for name, copy in to_torch(weights).items():
        source = kept[name]
        # A copy from a device that casts as well moves the larger type, and casts on one core of the host.
        copy.copy_(source if source.device.type == "cpu" else source.to(copy.dtype))
    return weights


def to_torch(weights: Weights) -> dict[str, torch.Tensor]:
    """CPU tensors with the same bits, which share the memory of `weights` where that is writable."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        dtype = TORCH_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise InvalidWeightsError(f"{name} has the type {tensor.dtype}, which torch does not have here")
        bits = tensor.bits if tensor.bits.flags.writeable else tensor.bits.copy()
        signed = torch.from_numpy(bits.view(SIGNED[bits.dtype.itemsize]))
        tensors[name] = signed.view(dtype).reshape(tensor.shape)
    return tensors


def _form_of(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> TensorForm:
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    type_name = DTYPES.get(target)
    if type_name is None:
        raise InvalidWeightsError(f"{name} has the type {target}, which does not travel: convert it first")
    return check_form(name, type_name, tensor.shape)

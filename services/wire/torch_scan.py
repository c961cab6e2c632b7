"""The encoder's questions, answered by torch where the weights lie: from a GPU only what changed comes over.

    masters ─► bf16 bits on the device ─┬─ compare, compact ─► positions, differences ─► host: base + differences = new
               base bits on the device ─┘  exponents, ranks ─► per group, for xc         (later, off the training path)

The same code runs on any device, and gives the same bytes as the host's path bit for bit.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services.wire.delta.decode import allocate
from services.wire.delta.exponents import EXPONENT_SHIFT
from services.wire.delta.layout import Chunk, gather
from services.wire.delta.members import SAMPLE_STRIDE, Exponents
from services.wire.delta.memory import Memory
from services.wire.delta.sparse import Changes, add_to, concatenated
from services.wire.delta.tensors import BITS_TYPE, ITEM_BYTES, Bits, Positions, Weights, forms_of
from services.wire.torch_bits import CARRIER, DTYPES

SCAN_ELEMENTS = 64 << 20
"""Elements compared at once: bounds the device's scratch memory to about 1.2 GB."""

_F16_SHIFT = EXPONENT_SHIFT["F16"]
DeviceBits = dict[str, torch.Tensor]
"""Flat signed integers of the item's size, by canonical name."""


def device_bits(tensors: Mapping[str, torch.Tensor], names: Sequence[str], dtype: torch.dtype) -> DeviceBits:
    """The bits of `names` as to_bits casts them, in fresh memory on their own device."""
    found: DeviceBits = {}
    for name in names:
        tensor = tensors[name].detach()
        target = dtype if tensor.is_floating_point() else tensor.dtype
        cast = tensor.to(dtype=target, copy=True, memory_format=torch.contiguous_format)
        found[name] = cast.reshape(-1).view(CARRIER[ITEM_BYTES[DTYPES[target]]])
    return found


def compare(base_bits: DeviceBits, new_bits: DeviceBits) -> dict[str, Changes]:
    """What changed, by tensor, on the host: all that crosses the bus."""
    return {name: scan_on_device(bits, new_bits[name]) for name, bits in base_bits.items()}


def scan_on_device(base: torch.Tensor, new: torch.Tensor) -> Changes:
    """What changed between two flat tensors of bits, compacted on their device."""
    pieces: list[Changes] = []
    for start in range(0, base.numel(), SCAN_ELEMENTS):
        before, after = base[start : start + SCAN_ELEMENTS], new[start : start + SCAN_ELEMENTS]
        found = torch.nonzero(after != before).reshape(-1)
        differences = _bits(after[found] - before[found])
        pieces.append(Changes(count=before.numel(), positions=_positions(found) + start, differences=differences))
    if not pieces:
        return Changes(count=0, positions=np.zeros(0, np.int64), differences=_bits(base[:0]))
    return concatenated(pieces, base.numel())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceComparison:
    """Two versions on a device, and the newer one on the host too. `found` is what `compare` found, by tensor."""

    base: Weights
    new: Weights
    base_bits: DeviceBits
    found: Mapping[str, Changes]
    stream: torch.cuda.Stream | None
    """Of the encoder: on the device's default one each copy to the host would wait for the kernels of the next training
    step that are queued there. None: not on CUDA."""

    def changes(self, chunk: Chunk) -> Changes:
        pieces: list[Changes] = []
        offset = 0
        for part in chunk.segments:
            whole = self.found[part.name]
            first, last = np.searchsorted(whole.positions, (part.start, part.start + part.count))
            positions = whole.positions[first:last] + (offset - part.start)
            pieces.append(Changes(count=part.count, positions=positions, differences=whole.differences[first:last]))
            offset += part.count
        return concatenated(pieces, offset)

    def exponents(self, chunk: Chunk) -> "DeviceExponents":
        parts = [self.base_bits[part.name][part.start : part.start + part.count] for part in chunk.segments]
        with torch.cuda.stream(self.stream):
            bits = torch.cat(parts) if len(parts) > 1 else parts[0]
            return DeviceExponents.of(bits, EXPONENT_SHIFT[chunk.dtype], self.stream)

    def values(self, chunk: Chunk) -> Bits:
        return gather(self.new, chunk)


def comparison_of(
    base: Weights,
    base_bits: DeviceBits,
    found: Mapping[str, Changes],
    *,
    workers: int = 1,
    stream: torch.cuda.Stream | None = None,
    memory: Memory | None = None,
) -> DeviceComparison:
    """Makes the newer version on the host: the base with what changed. Blocks for a copy of the weights."""
    new = allocate(forms_of(base), memory)
    with ThreadPoolExecutor(workers, thread_name_prefix="snapshot") as pool:
        jobs = [
            pool.submit(add_to, new[name].bits, base[name].bits, changes.positions, changes.differences)
            for name, changes in found.items()
        ]
        for job in jobs:
            job.result()
    return DeviceComparison(base=base, new=new, base_bits=base_bits, found=found, stream=stream)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceExponents:
    """Exponents of a base chunk, on the device."""

    fields: torch.Tensor
    """u8, one per element."""
    stream: torch.cuda.Stream | None = None
    """What they were computed on, and all that is asked of them is."""

    @staticmethod
    def of(bits: torch.Tensor, shift: int, stream: torch.cuda.Stream | None = None) -> "DeviceExponents":
        """To be called on that stream."""
        mask = 0x1F if shift == _F16_SHIFT else 0xFF
        return DeviceExponents(fields=((bits >> shift) & mask).to(torch.uint8), stream=stream)

    def sampled(self) -> Exponents:
        with torch.cuda.stream(self.stream):
            return to_host(self.fields[::SAMPLE_STRIDE])

    def at(self, positions: Positions) -> Exponents:
        with torch.cuda.stream(self.stream):
            return to_host(self.fields[self._indices(positions)])

    def ranked(self, limits: Sequence[int], changes: Changes, changed_exponents: Exponents) -> list[Changes]:
        groups: list[Changes] = []
        with torch.cuda.stream(self.stream):
            for low, high in zip([0, *limits], [*limits, 256], strict=True):
                mine = (changed_exponents >= low) & (changed_exponents < high)
                members = (self.fields >= low) if high == 256 else (self.fields >= low) & (self.fields < high)
                counted = torch.cumsum(members, 0, dtype=torch.int32)
                ranks = counted[self._indices(changes.positions[mine])] - 1
                count = int(counted[-1])
                groups.append(Changes(count=count, positions=_positions(ranks), differences=changes.differences[mine]))
        return groups

    def _indices(self, positions: Positions) -> torch.Tensor:
        return to_device(positions.astype(np.int32), self.fields.device)


def to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """With to_device all of any size that crosses the bus."""
    return tensor.cpu().numpy()


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def _positions(found: torch.Tensor) -> Positions:
    """Below 2**31: a chunk or a scan has fewer elements."""
    return to_host(found.to(torch.int32)).astype(np.int64)


def _bits(tensor: torch.Tensor) -> Bits:
    return to_host(tensor).view(BITS_TYPE[tensor.element_size()])

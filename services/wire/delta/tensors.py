"""Model weights as bit patterns, and the names, shapes and digests that both ends of the wire agree on."""

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import cast

import numpy as np
from blake3 import blake3

from services.runtime.errors import InvalidWeightsError

ITEM_BYTES: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Safetensors dtype name to item size in bytes. Types narrower than a byte are refused."""

EXPONENT_MASK: dict[str, int] = {
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F80_0000,
    "F64": 0x7FF0_0000_0000_0000,
    "F8_E5M2": 0x7C,
}
"""Exponent bits of the types whose all-ones exponent means infinity or NaN."""

BITS_TYPE: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_\-])?", re.ASCII)
MAX_NAME_CHARS = 512
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48
HASH_BLOCK_BYTES = 8 << 20
"""What a thread hashes at a time: a part of a large tensor, or several small ones."""

Bits = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
Positions = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BitTensor:
    """One tensor as bits, never interpreted, so that -0, NaN payloads and denormals survive.

    `dtype` is the safetensors name; `bits` is flat, C-contiguous, little-endian, unsigned, of the item size.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: Bits

    def __post_init__(self) -> None:
        size = ITEM_BYTES.get(self.dtype)
        if size is None:
            raise InvalidWeightsError(f"tensor type {self.dtype!r} is not supported: convert the checkpoint first")
        if self.bits.dtype != BITS_TYPE[size] or self.bits.ndim != 1 or not self.bits.flags.c_contiguous:
            raise InvalidWeightsError(f"the bits of a {self.dtype} tensor must be flat unsigned {size}-byte integers")
        if self.bits.size != prod(self.shape):
            raise InvalidWeightsError(f"{self.bits.size} elements do not fill the shape {list(self.shape)}")

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes

    def same_bits(self, other: "BitTensor") -> bool:
        """Equality of type, shape and every bit."""
        same_form = self.dtype == other.dtype and self.shape == other.shape
        return same_form and bool(np.array_equal(self.bits, other.bits))


Weights = Mapping[str, BitTensor]
"""Canonical Hugging Face parameter names to tensors; tied weights appear under one name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorForm:
    """What a tensor is apart from its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


def check_name(name: str) -> str:
    """Returns `name` if it can only be a parameter name: ASCII words and dots, never a path.

    Raises InvalidWeightsError. Names are never used as paths; this keeps look-alikes and control characters out too.
    """
    if len(name) > MAX_NAME_CHARS or ".." in name or name == "__metadata__" or NAME.fullmatch(name) is None:
        raise InvalidWeightsError(
            f"{name[:80]!a} is not a parameter name: use up to {MAX_NAME_CHARS} ASCII letters, digits, _ - and dots"
        )
    return name


def check_form(name: str, dtype: str, shape: Iterable[int]) -> TensorForm:
    """A form that is safe to compute sizes with. Raises InvalidWeightsError."""
    check_name(name)
    if dtype not in ITEM_BYTES:
        raise InvalidWeightsError(f"{name} has the unsupported type {dtype[:40]!a}: convert the checkpoint first")
    sizes = tuple(shape)
    if len(sizes) > MAX_DIMENSIONS or any(type(size) is not int or not 0 <= size <= MAX_ELEMENTS for size in sizes):
        raise InvalidWeightsError(f"{name} has an impossible shape")
    if prod(sizes) > MAX_ELEMENTS:
        raise InvalidWeightsError(f"{name} has an impossible shape: more than {MAX_ELEMENTS} elements")
    return TensorForm(name=name, dtype=dtype, shape=sizes)


def forms_of(weights: Weights) -> list[TensorForm]:
    """The forms of all tensors, sorted by name: the order that everything else uses."""
    return [check_form(name, weights[name].dtype, weights[name].shape) for name in sorted(weights)]


def update_with(hasher: blake3, bits: Bits) -> None:
    """Adds the little-endian bytes of the elements."""
    data = bits.view(np.uint8)
    for start in range(0, data.size, HASH_BLOCK_BYTES):
        hasher.update(memoryview(cast("bytes", data[start : start + HASH_BLOCK_BYTES])))


def digest_of(bits: Bits) -> bytes:
    """BLAKE3-256 of the little-endian bytes (docs/decisions/0001-blake3-for-tensors.md)."""
    hasher = blake3()
    update_with(hasher, bits)
    return hasher.digest()


class RunningDigests:
    """Digests of tensors while they are written: a piece that continues its tensor is hashed from the cache.

    Pieces may come in any order and from several threads, each element once: what was not in order is hashed at last.
    """

    def __init__(self) -> None:
        self._reached: dict[str, tuple[blake3, int]] = {}

    def hasher_at(self, name: str, start: int) -> blake3 | None:
        """To be fed with the piece of `name` from `start` on, then `done`; None if what is before it is not hashed."""
        hasher, reached = self._reached.get(name, (None, 0))
        return (hasher or blake3()) if reached == start else None

    def done(self, name: str, hasher: blake3, stop: int) -> None:
        """All elements before `stop` are hashed."""
        self._reached[name] = hasher, stop

    def advance(self, name: str, bits: Bits, start: int, stop: int) -> None:
        """Hashes the tensor, `bits`, up to `stop`, before which all is written, if all before `start` is hashed."""
        hasher, reached = self._reached.get(name, (blake3(), 0))
        if start <= reached < stop:
            update_with(hasher, bits[reached:stop])
            self.done(name, hasher, stop)

    def of(self, name: str, bits: Bits) -> bytes:
        """The digest of the whole tensor, which is `bits`."""
        hasher, reached = self._reached.get(name, (blake3(), 0))
        update_with(hasher, bits[reached:])
        return hasher.digest()


def digests_of(weights: Weights, workers: int | ThreadPoolExecutor = 1) -> dict[str, bytes]:
    """The digest of every tensor, hashed on so many threads or on a pool of the caller's."""
    if isinstance(workers, int):
        with ThreadPoolExecutor(workers) as pool:
            return digests_of(weights, pool)

    found = [workers.submit(job) for job in digest_jobs(weights, sorted(weights))]
    return {name: digest for some in found for name, digest in some.result().items()}


def digest_jobs(weights: Weights, names: Iterable[str]) -> list[Callable[[], dict[str, bytes]]]:
    """The digests of these tensors, in pieces that are work enough for a thread."""

    def digests(group: list[str]) -> dict[str, bytes]:
        return {name: digest_of(weights[name].bits) for name in group}

    groups: list[list[str]] = []
    room = 0
    for name in names:
        if room <= 0:
            groups.append([])
            room = HASH_BLOCK_BYTES
        groups[-1].append(name)
        room -= weights[name].nbytes
    return [partial(digests, group) for group in groups]


def root_of_digests(forms: Iterable[TensorForm], digests: Mapping[str, bytes]) -> str:
    """Hex root: BLAKE3-256 over one line per tensor, sorted by name: name, dtype, shape, digest."""
    hasher = blake3()
    for form in sorted(forms, key=lambda form: form.name):
        shape = ",".join(map(str, form.shape))
        hasher.update(f"{form.name}\t{form.dtype}\t{shape}\t{digests[form.name].hex()}\n".encode())
    return hasher.hexdigest()


def root_of(weights: Weights, workers: int = 1) -> str:
    """Hex root digest of a whole policy: equal roots mean equal names, types, shapes and bits."""
    return root_of_digests(forms_of(weights), digests_of(weights, workers))

"""What takes an encoder's time in machine code, where numba is installed: the comparison of two versions 1.7 times as
fast as numpy's passes, gaps as bytes 3 times.

numba takes half a second to load and, once on a machine, seconds to compile. That is worth it in a process that encodes
again and again, so only one that called `prepare` has it; `scan` and `gaps_of` (sparse.py) do the same without.
"""

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.runtime.log import get_logger
from services.wire.delta.streams import Bytes8
from services.wire.delta.tensors import Bits, Positions

ITEM = np.dtype(np.uint16)
"""bf16 and fp16: what policies are made of."""

LANES = 4
"""Items in a word of 64 bits."""

SPARSE = 16
"""The scan gives up once more than one item in this many has changed: other passes take most of the time then."""

FLAGS = 4096
"""Words per pass: these and their flags stay in a core's own cache."""

ESCAPE = 255
"""The gap byte that says "this many more, and the gap goes on"."""

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernels:
    find: Callable[[Words, Words, int, Positions, Bits], int]
    code: Callable[[Positions, Bytes8], int]


_log = get_logger("wire.delta")
_lock = threading.Lock()
_kernels: _Kernels | None = None


def find_changes(base: Bits, new: Bits, offset: int) -> tuple[Positions, Bits] | None:
    """Where they differ, counted from `offset` on, and by what modulo 2^16; None where nothing is prepared, or not for
    such arrays, or more than one item in SPARSE has changed."""
    kernels = _kernels
    if kernels is None or base.dtype != ITEM or base.size % LANES or (base.ctypes.data | new.ctypes.data) % 8:
        return None
    if not (base.flags.c_contiguous and new.flags.c_contiguous):
        return None
    room = base.size // SPARSE + LANES * FLAGS
    positions, differences = np.empty(room, np.int64), np.empty(room, ITEM)
    found = kernels.find(base.view(np.uint64), new.view(np.uint64), offset, positions, differences)
    return None if found < 0 else (positions[:found], differences[:found])


def code_gaps(positions: Positions) -> Bytes8 | None:
    """As `gaps_of`; None where nothing is prepared."""
    kernels = _kernels
    if kernels is None or positions.size == 0:
        return None
    unchanged = int(positions[-1]) + 1 - positions.size
    coded = np.empty(positions.size + unchanged // ESCAPE, np.uint8)
    return coded[: kernels.code(positions, coded)]


def prepare() -> bool:
    """Compiles, or loads what was compiled before. Blocks; for any thread.

    False, and a line in the log, where numba is missing or refuses this machine.
    """
    global _kernels
    with _lock:
        if _kernels is None:
            try:
                _kernels = _compiled(importlib.import_module("numba"))
            except Exception as error:  # numba and LLVM raise what they like, and the other way is there
                _log.info("encoder_not_compiled", error=error)
        return _kernels is not None


def _compiled(numba: Any) -> _Kernels:
    def given(item: Any) -> Any:
        return numba.types.Array(item, 1, "C", readonly=True)

    def written(item: Any) -> Any:
        return numba.types.Array(item, 1, "C")

    def compile_for(function: Callable[..., int], *arguments: Any) -> Callable[..., int]:
        signature = numba.int64(*arguments)
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except Exception:  # no folder that machine code can be kept in, or what is kept there is damaged
            return numba.njit(signature, nogil=True)(function)

    words = given(numba.uint64)
    return _Kernels(
        find=compile_for(_find, words, words, numba.int64, written(numba.int64), written(numba.uint16)),
        code=compile_for(_code, given(numba.int64), written(numba.uint8)),
    )


def _code(positions: Positions, coded: Bytes8) -> int:
    size = 0
    next_position = np.int64(0)
    for position in positions:
        gap = position - next_position
        while gap >= ESCAPE:
            coded[size] = ESCAPE
            size += 1
            gap -= ESCAPE
        coded[size] = gap
        size += 1
        next_position = position + 1
    return size


def _find(base: Words, new: Words, offset: int, positions: Positions, differences: Bits) -> int:
    """Numba's part of Python. First which words differ, which the processor compares many at a time; then, without a
    branch that it could not foresee, their numbers; then their items."""
    flags = np.empty(FLAGS, np.uint8)
    eights = flags.view(np.uint64)
    differ = np.empty(FLAGS + 1, np.int64)
    found = 0
    for start in range(0, base.size, FLAGS):
        before = base[start : start + FLAGS]
        after = new[start : start + FLAGS]
        for word in range(before.size):
            flags[word] = before[word] != after[word]
        flags[before.size :] = 0
        some = 0
        for eight in range(eights.size):
            bits = eights[eight]
            if bits != 0:
                for word in range(8):
                    differ[some] = eight * 8 + word
                    some += np.int64(bits & np.uint64(1))
                    bits = bits >> np.uint64(8)
        if found + some * LANES > positions.size:
            return -1
        for number in range(some):
            word = differ[number]
            old, now = before[word], after[word]
            for lane in range(LANES):
                difference = np.uint16(now) - np.uint16(old)
                positions[found] = offset + (start + word) * LANES + lane
                differences[found] = difference
                found += np.int64(np.uint16(difference) != 0)
                old = old >> np.uint64(16)
                now = now >> np.uint64(16)
    return int(found)

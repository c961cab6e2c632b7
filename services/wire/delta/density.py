"""Known differences to bytes, SX where few elements changed, SPLIT where many did; the first byte says which."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from services.runtime.errors import CorruptObjectError
from services.wire.delta.dense import pack_split, read_split, split_of_changes
from services.wire.delta.sparse import Changes, pack_changes, read_changes
from services.wire.delta.streams import StreamReader
from services.wire.delta.tensors import Bits

SPLIT_FROM_DENSITY = 0.12
SX_TO_DENSITY = 0.45
"""Between these both are tried, and the smaller is kept."""


class Encoding(IntEnum):
    """The first byte of a payload. The numbers are on the wire."""

    WHOLE = 1
    SPLIT = 2
    SX = 3
    XC = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """new - base of every element, modulo 2^bits."""

    differences: Bits


def encode_changes(changes: Changes) -> bytes:
    """The smaller of SX and SPLIT, with its first byte."""
    density = changes.positions.size / max(changes.count, 1)
    candidates: list[bytes] = []
    if density <= SX_TO_DENSITY:
        candidates.append(bytes((Encoding.SX,)) + pack_changes(changes))
    if density >= SPLIT_FROM_DENSITY:
        candidates.append(bytes((Encoding.SPLIT,)) + pack_split(split_of_changes(changes)))
    return min(candidates, key=len)


def read_encoded(
    encoding: int, reader: StreamReader, count: int, dtype: "np.dtype[np.unsignedinteger]"
) -> Changes | Split:
    """What follows a first byte of SX or SPLIT. Raises CorruptObjectError."""
    if encoding == Encoding.SX:
        return read_changes(reader, count, dtype)
    if encoding == Encoding.SPLIT:
        return Split(differences=read_split(reader, count, dtype))
    raise CorruptObjectError(f"a chunk has the unknown encoding {encoding}: this build is too old, or it is damaged")

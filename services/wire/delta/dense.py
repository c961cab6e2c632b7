"""For chunks where much has changed: SPLIT, differences of every element; WHOLE, the values themselves.

Both are one stream per byte of the item, so that zstd's Huffman coder sees bytes of one kind. SPLIT folds the sign into
the lowest bit (0, -1, 1, -2, 2 become 0 to 4), so that small differences of either sign have zero high bytes.
"""

import numpy as np

from services.wire.delta.sparse import SIGNED, Changes
from services.wire.delta.streams import StreamReader, pack_planes, read_planes
from services.wire.delta.tensors import Bits


def pack_split(differences: Bits) -> bytes:
    """The SPLIT payload of new - base, modulo 2^bits."""
    signed = differences.view(SIGNED[differences.dtype.itemsize])
    folded = (signed << 1) ^ (signed >> (8 * differences.dtype.itemsize - 1))
    return pack_planes(folded.view(differences.dtype))


def read_split(reader: StreamReader, count: int, dtype: "np.dtype[np.unsignedinteger]") -> Bits:
    """new - base of `count` elements, modulo 2^bits. Raises CorruptObjectError."""
    folded = read_planes(reader, count, dtype)
    one = dtype.type(1)
    return (folded >> one) ^ -(folded & one)


def split_of_changes(changes: Changes) -> Bits:
    """The differences of all elements, zero where nothing changed."""
    differences = np.zeros(changes.count, changes.differences.dtype)
    differences[changes.positions] = changes.differences
    return differences


def changes_of_split(differences: Bits) -> Changes:
    """The inverse of `split_of_changes`."""
    positions = np.flatnonzero(differences != 0)  # numpy finds the few that are true fast among booleans only
    return Changes(count=differences.size, positions=positions, differences=differences[positions])

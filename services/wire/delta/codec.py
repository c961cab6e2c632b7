"""One chunk to bytes and back: chooses the encoding by density, and dispatches by the payload's first byte.

payload = u8 encoding, then the encoding's streams.  A chunk without changes has no payload.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np

from services.runtime.errors import CorruptObjectError
from services.wire.delta.dense import pack_split, read_split, split_of_changes
from services.wire.delta.layout import Chunk, gather, views_of
from services.wire.delta.sparse import Changes, pack_changes, read_changes, scan
from services.wire.delta.streams import StreamReader, pack_planes, read_planes
from services.wire.delta.tensors import BITS_TYPE, ITEM_BYTES, Bits, Weights

SPLIT_FROM_DENSITY = 0.12
SPARSE_TO_DENSITY = 0.45
WHOLE_FROM_DENSITY = 0.60


class Codec(StrEnum):
    """What an update asks for. Single chunks may fall back to a dense encoding."""

    KEYFRAME = "keyframe"
    SX = "sx"
    XC = "xc"


class Encoding(IntEnum):
    """What a chunk's payload is. The numbers are on the wire."""

    WHOLE = 1
    SPLIT = 2
    SX = 3
    XC = 4


def encode_whole(weights: Weights, chunk: Chunk) -> bytes:
    """The values themselves."""
    return encode_values(gather(weights, chunk))


def encode_values(values: Bits) -> bytes:
    """The payload of known values."""
    return bytes((Encoding.WHOLE,)) + pack_planes(values)


def encode_change(base: Weights, new: Weights, chunk: Chunk, codec: Codec) -> tuple[bytes, int]:
    """The payload that turns the base's chunk into the new one, and the number of changes: nothing and 0 if none."""
    changes = _scan_chunk(base, new, chunk)
    changed = changes.positions.size
    if changed == 0:
        return b"", 0
    density = changed / changes.count
    candidates: list[bytes] = []
    if density <= SPARSE_TO_DENSITY:
        candidates.append(bytes((Encoding.SX,)) + pack_changes(changes))
    if density >= SPLIT_FROM_DENSITY:
        candidates.append(bytes((Encoding.SPLIT,)) + pack_split(gather(base, chunk), gather(new, chunk)))
    if density >= WHOLE_FROM_DENSITY:
        candidates.append(encode_whole(new, chunk))
    return min(candidates, key=len), changed


def encode_differences(differences: Changes) -> bytes:
    """The payload of known differences, for folding: sparse or split, whichever is smaller."""
    if differences.positions.size == 0:
        return b""
    density = differences.positions.size / differences.count
    candidates: list[bytes] = []
    if density <= SPARSE_TO_DENSITY:
        candidates.append(bytes((Encoding.SX,)) + pack_changes(differences))
    if density >= SPLIT_FROM_DENSITY:
        dense = split_of_changes(differences)
        candidates.append(bytes((Encoding.SPLIT,)) + pack_split(np.zeros_like(dense), dense))
    return min(candidates, key=len)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whole:
    """A chunk's new values."""

    values: Bits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """new - base of every element of a chunk."""

    differences: Bits


def decode_chunk(payload: memoryview, chunk: Chunk, base: Weights | None) -> Whole | Split | Changes:
    """What a payload says. Only XC needs the base. Raises CorruptObjectError on anything that is not a payload."""
    dtype = np.dtype(BITS_TYPE[ITEM_BYTES[chunk.dtype]])
    reader = StreamReader(payload)
    encoding = reader.take(1)[0]
    decoded: Whole | Split | Changes
    if encoding == Encoding.WHOLE:
        decoded = Whole(values=read_planes(reader, chunk.count, dtype))
    elif encoding == Encoding.SPLIT:
        decoded = Split(differences=read_split(reader, chunk.count, dtype))
    elif encoding == Encoding.SX:
        decoded = read_changes(reader, chunk.count, dtype)
    else:
        raise CorruptObjectError(
            f"a chunk has the unknown encoding {encoding}: this build is too old, or it is damaged"
        )
    reader.end()
    return decoded


def write_chunk(decoded: Whole | Split | Changes | None, chunk: Chunk, base: Weights | None, out: Weights) -> None:
    """Writes the chunk's new values into the tensors of `out`. None: nothing changed. `base` is not written to."""
    offset = 0
    for segment, target in zip(chunk.segments, views_of(out, chunk), strict=True):
        stop = offset + segment.count
        if isinstance(decoded, Whole):
            target[:] = decoded.values[offset:stop]
        elif base is None:
            raise CorruptObjectError("this update changes an earlier version: give the version that it was made from")
        else:
            source = base[segment.name].bits[segment.start : segment.start + segment.count]
            if isinstance(decoded, Split):
                np.add(source, decoded.differences[offset:stop], out=target)
            else:
                target[:] = source
                if decoded is not None:
                    first, last = np.searchsorted(decoded.positions, (offset, stop))
                    target[decoded.positions[first:last] - offset] += decoded.differences[first:last]
        offset = stop


def _scan_chunk(base: Weights, new: Weights, chunk: Chunk) -> Changes:
    """`scan` over the chunk's segments, without copying them into one."""
    pieces: list[Changes] = []
    offset = 0
    for before, after in zip(views_of(base, chunk), views_of(new, chunk), strict=True):
        pieces.append(scan(before, after, offset))
        offset += before.size
    if len(pieces) == 1:
        return pieces[0]
    positions = np.concatenate([piece.positions for piece in pieces])
    return Changes(
        count=offset, positions=positions, differences=np.concatenate([piece.differences for piece in pieces])
    )

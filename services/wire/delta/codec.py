"""One chunk to bytes and back: chooses the encoding by density, and dispatches by the payload's first byte.

payload = u8 encoding, then the encoding's streams.  A chunk without changes has no payload.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from services.runtime.errors import InvalidWeightsError
from services.wire.delta.conditioned import pack_by_exponent, read_by_exponent
from services.wire.delta.density import Encoding, Split, encode_changes, read_encoded
from services.wire.delta.exponents import EXPONENT_SHIFT, ExponentSource, HostExponents
from services.wire.delta.layout import Chunk, gather, views_of
from services.wire.delta.sparse import Changes, concatenated, scan
from services.wire.delta.streams import StreamReader, pack_planes, read_planes
from services.wire.delta.tensors import BITS_TYPE, ITEM_BYTES, Bits, RunningDigests, Weights, update_with
from services.wire.delta.validate import largest_magnitude

WHOLE_FROM_DENSITY = 0.60
WRITE_ELEMENTS = 512 << 10
CLUSTERED = 3.0
"""The mean square of gaps over the square of their mean is at most 2 where changes fall evenly."""


class WrongBaseError(InvalidWeightsError):
    """The update is sound, but made from other weights than the base: ask for a new plan."""


class Codec(StrEnum):
    """What an update asks for. Single chunks may fall back to a dense encoding."""

    KEYFRAME = "keyframe"
    SX = "sx"
    XC = "xc"


def encode_whole(weights: Weights, chunk: Chunk) -> bytes:
    """The values themselves."""
    return encode_values(gather(weights, chunk))


def encode_values(values: Bits) -> bytes:
    """The payload of known values."""
    return bytes((Encoding.WHOLE,)) + pack_planes(values)


class Comparison(Protocol):
    """Two versions of a policy, wherever they lie: what an encoder asks of them, chunk by chunk, from any thread."""

    @property
    def base(self) -> Weights:
        """The older one, on the host."""
        ...

    def changes(self, chunk: Chunk) -> Changes: ...

    def exponents(self, chunk: Chunk) -> ExponentSource:
        """Of the base; only for the types of EXPONENT_SHIFT."""
        ...

    def values(self, chunk: Chunk) -> Bits:
        """The new elements."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostComparison:
    """Both versions in this process's memory."""

    base: Weights
    new: Weights

    def changes(self, chunk: Chunk) -> Changes:
        return _scan_chunk(self.base, self.new, chunk)

    def exponents(self, chunk: Chunk) -> ExponentSource:
        return HostExponents(pieces=views_of(self.base, chunk), shift=EXPONENT_SHIFT[chunk.dtype])

    def values(self, chunk: Chunk) -> Bits:
        return gather(self.new, chunk)


def encode_change(comparison: Comparison, chunk: Chunk, codec: Codec) -> tuple[bytes, int]:
    """The payload that turns the base's chunk into the new one, and the number of changes: nothing and 0 if none."""
    changes = comparison.changes(chunk)
    changed = changes.positions.size
    if changed == 0:
        return b"", 0
    density = changed / changes.count
    candidates: list[bytes] = []
    conditioned = codec is Codec.XC and chunk.dtype in EXPONENT_SHIFT
    if conditioned:
        candidates.append(bytes((Encoding.XC,)) + pack_by_exponent(comparison.exponents(chunk), changes))
    if not conditioned or _clustered(changes):
        candidates.append(encode_changes(changes))
    if density >= WHOLE_FROM_DENSITY:
        candidates.append(encode_values(comparison.values(chunk)))
    return min(candidates, key=len), changed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whole:
    """A chunk's new values."""

    values: Bits


def decode_chunk(payload: memoryview, chunk: Chunk, base: Weights | None) -> Whole | Split | Changes:
    """What a payload says. Only XC needs the base. Raises CorruptObjectError on anything that is not a payload."""
    dtype = np.dtype(BITS_TYPE[ITEM_BYTES[chunk.dtype]])
    reader = StreamReader(payload)
    encoding = reader.take(1)[0]
    decoded: Whole | Split | Changes
    if encoding == Encoding.WHOLE:
        decoded = Whole(values=read_planes(reader, chunk.count, dtype))
    elif encoding == Encoding.XC:
        if base is None:
            raise WrongBaseError("an xc delta can only be read together with the version that it was made from")
        decoded = read_by_exponent(reader, views_of(base, chunk), chunk.dtype)
    else:
        decoded = read_encoded(encoding, reader, chunk.count, dtype)
    reader.end()
    return decoded


def write_chunk(
    decoded: Whole | Split | Changes | None,
    chunk: Chunk,
    base: Weights | None,
    out: Weights,
    running: RunningDigests | None = None,
    peaks: dict[str, int] | None = None,
    level: bool = False,
) -> None:
    """Writes the chunk's new values into the tensors of `out`, and hashes them. None: nothing changed.

    `base` is not written to. `peaks` gets each tensor's largest magnitude, as bits, among what changed here. `level`:
    `out` has the values of `base` already.
    """
    if base is None and not isinstance(decoded, Whole):
        raise WrongBaseError("this update changes an earlier version: give the version that it was made from")
    offset = 0
    for segment, target in zip(chunk.segments, views_of(out, chunk), strict=True):
        hasher = None if running is None else running.hasher_at(segment.name, segment.start)
        source = None if base is None else base[segment.name].bits[segment.start : segment.start + segment.count]
        # Block by block: what was just written is still in the cache when it is hashed.
        for start in range(0, target.size, WRITE_ELEMENTS):
            block = target[start : start + WRITE_ELEMENTS]
            before = None if source is None else source[start : start + WRITE_ELEMENTS]
            changed = _write_block(decoded, offset + start, block, before, level)
            if hasher is not None:
                update_with(hasher, block)
            if peaks is not None:
                peaks[segment.name] = max(peaks.get(segment.name, 0), largest_magnitude(changed))
        if running is not None and hasher is not None:
            running.done(segment.name, hasher, segment.start + segment.count)
        offset += segment.count


def _write_block(
    decoded: Whole | Split | Changes | None, start: int, block: Bits, before: Bits | None, level: bool
) -> Bits:
    """New values of the chunk's elements from `start` on; `before` are the old ones. Returns those that may differ."""
    stop = start + block.size
    if isinstance(decoded, Whole):
        block[:] = decoded.values[start:stop]
        return block
    if before is None:
        return block[:0]
    if isinstance(decoded, Split):
        return np.add(before, decoded.differences[start:stop], out=block)
    if not level:
        block[:] = before
    if decoded is None:
        return block[:0]
    first, last = np.searchsorted(decoded.positions, (start, stop))
    places = decoded.positions[first:last] - start
    values = block[places]
    values += decoded.differences[first:last]
    block[places] = values
    return values


def _clustered(changes: Changes) -> bool:
    """Whether whole rows did not change, say: gaps of very different lengths are what SX codes better."""
    gaps = np.diff(changes.positions, prepend=-1).astype(np.float64)
    # Not gaps @ gaps: BLAS would start threads of its own, which wait for the next product on other processors.
    return float(np.square(gaps).sum()) * gaps.size > CLUSTERED * float(gaps.sum()) ** 2


def _scan_chunk(base: Weights, new: Weights, chunk: Chunk) -> Changes:
    """`scan` over the chunk's segments, without copying them into one."""
    pieces: list[Changes] = []
    offset = 0
    for before, after in zip(views_of(base, chunk), views_of(new, chunk), strict=True):
        pieces.append(scan(before, after, offset))
        offset += before.size
    return concatenated(pieces, offset)

"""Byte streams inside a chunk: stored or zstd, with every size checked before anything is allocated.

stream = u32 little-endian: length << 1 | compressed;  then `length` bytes
"""

import struct
import threading
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import zstandard

from services.runtime.errors import CorruptObjectError
from services.wire.delta.tensors import Bits

LENGTH = struct.Struct("<I")
MAX_WINDOW_BYTES = 64 << 20
MIN_COMPRESSED_BYTES = 48
MAX_VARINT_BYTES = 5
SAMPLE_BYTES = 32 << 10
WORTHWHILE = 0.97

Bytes8 = np.ndarray[tuple[int], np.dtype[np.uint8]]

FAST = zstandard.ZstdCompressionParameters(
    window_log=22,
    chain_log=6,
    hash_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
    write_content_size=True,
    write_checksum=True,
)
"""Entropy coding with next to no matching: levels 1 and 3 find matches in noise, and pay for them."""

_local = threading.local()


def _compressor() -> zstandard.ZstdCompressor:
    """One per thread: a compressor must not be shared, and making one per stream costs more than a small stream."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=FAST)
    return _local.compressor


def compress(data: bytes | Bytes8) -> bytes:
    """One zstd frame that states its size and carries a checksum."""
    return _compressor().compress(cast("bytes", data))


def decompress(frame: memoryview | bytes, max_bytes: int) -> bytes:
    """The content of exactly one frame of at most `max_bytes`. Raises CorruptObjectError.

    The header is read first: a frame without a size or checksum, with a dictionary, or asking for a larger window or
    result than it may, is refused before memory is allocated for it.
    """
    try:
        header = zstandard.get_frame_parameters(frame)
    except (zstandard.ZstdError, ValueError) as error:
        raise CorruptObjectError("a compressed stream is not a zstd frame: fetch the object again") from error
    size = header.content_size
    if size == zstandard.CONTENTSIZE_UNKNOWN:
        raise CorruptObjectError("a compressed stream does not say its size: fetch the object again")
    if size > max_bytes:
        raise CorruptObjectError(f"a compressed stream claims more than the {max_bytes} bytes that it may hold")
    if header.window_size > MAX_WINDOW_BYTES or header.dict_id or not header.has_checksum:
        raise CorruptObjectError("a compressed stream has no checksum, a dictionary or too large a window")
    try:
        content = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompress(
            frame, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CorruptObjectError("a compressed stream is damaged: fetch the object again") from error
    if len(content) != size:
        raise CorruptObjectError("a compressed stream is shorter than it claims: fetch the object again")
    return content


def pack(data: Bytes8, *, try_zstd: bool = True) -> bytes:
    """One stream: compressed where that is smaller, else stored."""
    if try_zstd and data.size >= MIN_COMPRESSED_BYTES:
        frame = compress(data)
        if len(frame) < data.size:
            return LENGTH.pack(len(frame) << 1 | 1) + frame
    return LENGTH.pack(data.size << 1) + data.tobytes()


def varint(number: int) -> bytes:
    """7 bits per byte, lowest first; all bytes but the last have the highest bit set."""
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*coded, number))


@dataclass(slots=True)
class StreamReader:
    """Takes streams off a chunk's payload in order. Every method raises CorruptObjectError."""

    payload: memoryview
    _offset: int = field(default=0, init=False)

    def take(self, length: int) -> memoryview:
        """The next `length` plain bytes."""
        end = self._offset + length
        if end > len(self.payload):
            raise CorruptObjectError("a chunk ends early: fetch the object again")
        piece = self.payload[self._offset : end]
        self._offset = end
        return piece

    def number(self) -> int:
        return LENGTH.unpack(self.take(LENGTH.size))[0]

    def varint(self) -> int:
        """A number below 2^35, in as few bytes as it needs."""
        number = 0
        for shift in range(0, 7 * MAX_VARINT_BYTES, 7):
            (byte,) = self.take(1)
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    break
                return number
        raise CorruptObjectError("a chunk has a number that is too long: fetch the object again")

    def stream(self, max_bytes: int) -> Bytes8:
        """The next stream, at most `max_bytes` long when unpacked. Read-only where it was stored."""
        word = self.number()
        piece = self.take(word >> 1)
        if word & 1:
            return np.frombuffer(decompress(piece, max_bytes), np.uint8)
        if len(piece) > max_bytes:
            raise CorruptObjectError(f"a stream is longer than the {max_bytes} bytes that it may hold")
        return np.frombuffer(piece, np.uint8)

    def exact(self, length: int) -> Bytes8:
        """The next stream, which must unpack to `length` bytes."""
        data = self.stream(length)
        if data.size != length:
            raise CorruptObjectError(f"a stream holds {data.size} bytes instead of {length}: fetch the object again")
        return data

    def end(self) -> None:
        if self._offset != len(self.payload):
            raise CorruptObjectError("a chunk has bytes after its end: fetch the object again")


def _worth_compressing(data: Bytes8) -> bool:
    """Whether a sample from the middle shrinks: the low bytes of floating-point weights are noise, and are stored."""
    if data.size <= 2 * SAMPLE_BYTES:
        return True
    middle = data.size // 2
    return len(compress(data[middle : middle + SAMPLE_BYTES])) < WORTHWHILE * SAMPLE_BYTES


def pack_planes(values: Bits) -> bytes:
    """One stream per byte of the item, lowest first."""
    rows = values.view(np.uint8).reshape(-1, values.dtype.itemsize)
    planes = (np.ascontiguousarray(rows[:, plane]) for plane in range(values.dtype.itemsize))
    return b"".join(pack(data, try_zstd=_worth_compressing(data)) for data in planes)


def read_planes(reader: StreamReader, count: int, dtype: "np.dtype[np.unsignedinteger]") -> Bits:
    """`count` values of `dtype` from one stream per byte."""
    values = np.empty(count, dtype)
    rows = values.view(np.uint8).reshape(-1, dtype.itemsize)
    for plane in range(dtype.itemsize):
        rows[:, plane] = reader.exact(count)
    return values

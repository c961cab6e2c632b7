"""Objects: immutable bytes named by the SHA-256 of their content, and the checked chunks that they travel in."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from services.runtime.errors import BadInputError, CorruptObjectError
from services.wire.types import ObjectRef

CHUNK_BYTES = 512 << 10
"""Bytes of a chunk: large enough for few messages, small enough not to hold the event loop."""
MAX_CHUNK_BYTES = 1 << 20
"""Longest chunk that the protocol allows."""

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an object. `crc32c` (Castagnoli) is over `data`; `offset` is the position of its first byte."""

    offset: int
    data: bytes
    crc32c: int


def is_object_id(text: str) -> bool:
    """Whether `text` is 64 lower-case hex digits: only such a name may become a path."""
    return len(text) == 64 and _HEX.issuperset(text)


def check_object_id(text: str) -> str:
    """Returns `text`. Raises BadInputError unless it is an object id."""
    if not is_object_id(text):
        raise BadInputError("an object id is 64 lower-case hex digits; ask for a new plan")
    return text


def object_id_of(data: bytes | memoryview) -> str:
    """The name of these bytes."""
    return hashlib.sha256(data).hexdigest()


def object_ref_of(data: bytes) -> ObjectRef:
    """Name and size of these bytes."""
    return ObjectRef(object_id=object_id_of(data), size_bytes=len(data))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def chunk_of(offset: int, data: bytes) -> Chunk:
    """A chunk with its checksum."""
    return Chunk(offset=offset, data=data, crc32c=google_crc32c.value(data))


def read_chunk(descriptor: int, offset: int, end: int, size: int = CHUNK_BYTES) -> Chunk:
    """The next chunk of [offset, end) of an open file: `pread`, so that many readers share one descriptor.

    Raises CorruptObjectError when the file ends before `end`.
    """
    data = os.pread(descriptor, min(size, end - offset), offset)
    if not data and offset < end:
        raise CorruptObjectError("an object's file is shorter than the object; ask for a new plan")
    return chunk_of(offset, data)


def verify_chunk(chunk: Chunk, expected_offset: int) -> None:
    """Raises CorruptObjectError unless the chunk continues at `expected_offset` and its checksum holds."""
    if chunk.offset != expected_offset:
        raise CorruptObjectError(
            f"a chunk starts at byte {chunk.offset} instead of {expected_offset}; fetch again from there"
        )
    if len(chunk.data) > MAX_CHUNK_BYTES:
        raise CorruptObjectError(f"a chunk of {len(chunk.data)} bytes is longer than the protocol allows")
    if google_crc32c.value(chunk.data) != chunk.crc32c:
        raise CorruptObjectError(f"the chunk at byte {chunk.offset} was damaged on its way; fetch it again")

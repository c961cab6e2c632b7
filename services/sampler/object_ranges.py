"""An object on its way, as files: one for each range that a channel fetches, each only ever appended to.

    <sha256>.part            the first range; at the end the others are added to it, and it becomes the object
    <sha256>.<START>.part    the range from byte START

A file's length says how far its range has come, after a crash too: nothing else is written down.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.errors import StorageError

if TYPE_CHECKING:
    from hashlib import _Hash  # pyright: ignore[reportPrivateUsage] - the type of sha256() has no public name in 3.11

PART_SUFFIX = ".part"
LEAST_RANGE_BYTES = 256 << 10
"""Smaller objects are not worth a round trip more."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bytes [start, end) of an object, and the file that collects them."""

    path: Path
    start: int
    end: int


@dataclass(slots=True, kw_only=True, eq=False)
class Progress:
    """How far a range has come; `digest` is of its bytes so far, for the first range of an object that is hashed."""

    range: Range
    offset: int
    digest: "_Hash | None"

    def append(self, descriptor: int, data: bytes) -> None:
        """Writes all of `data` at the file's end. Raises StorageError or OSError."""
        view = memoryview(data)
        while view:
            written = os.write(descriptor, view)
            if written == 0:
                raise StorageError("the object cache takes no more bytes: free disk space")
            view = view[written:]
        if self.digest is not None:
            self.digest.update(data)
        self.offset += len(data)


def ranges_of(path: Path, size_bytes: int, lanes: int) -> list[Range]:
    """At most `lanes` ranges that together are the object that `path` will hold."""
    count = max(1, min(lanes, size_bytes // LEAST_RANGE_BYTES))
    edges = [size_bytes * number // count for number in range(count + 1)]
    names = [f"{path.name}{PART_SUFFIX}", *(f"{path.name}.{start}{PART_SUFFIX}" for start in edges[1:-1])]
    return [
        Range(path=path.with_name(name), start=start, end=end)
        for name, start, end in zip(names, edges[:-1], edges[1:], strict=True)
    ]


def begin(part: Range, hashed: bool) -> Progress:
    """Makes the file, or finds how far it came. What is beyond the range is cut off."""
    part.path.touch()
    if part.path.stat().st_size > part.end - part.start:
        os.truncate(part.path, part.end - part.start)
    if part.start or not hashed:
        return Progress(range=part, offset=part.start + part.path.stat().st_size, digest=None)
    with part.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Progress(range=part, offset=file.tell(), digest=digest)


def join(ranges: Sequence[Range], digest: "_Hash | None") -> None:
    """Adds the other ranges to the first one's file, and to its digest where there is one."""
    with ranges[0].path.open("ab") as whole:
        for part in ranges[1:]:
            with part.path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    whole.write(block)
                    if digest is not None:
                        digest.update(block)
    for part in ranges[1:]:
        part.path.unlink()


def discard(ranges: Sequence[Range]) -> None:
    for part in ranges:
        part.path.unlink(missing_ok=True)

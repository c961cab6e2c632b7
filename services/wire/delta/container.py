"""Strict reading and writing of the safetensors form: 8 bytes of header length, a JSON header, the data.

Stricter than the format: no duplicate JSON keys, offsets without holes or overlaps in file order, sizes that follow
from shape and type, a header of at most 16 MiB. Anything else is refused before memory is allocated for it.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

from services.runtime.errors import CorruptObjectError
from services.wire.delta.tensors import ITEM_BYTES, MAX_DIMENSIONS, MAX_ELEMENTS

HEADER_LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 16 << 20
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a file; `start` and `stop` are byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header. `entries` are in file order and fill the file to its last byte."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def header_bytes(length_field: bytes, file_bytes: int, limit: int = MAX_HEADER_BYTES) -> int:
    """The header's length from the first 8 bytes of a file of `file_bytes`. Raises CorruptObjectError."""
    if len(length_field) < HEADER_LENGTH.size:
        raise CorruptObjectError("the file is too short to be a safetensors file")
    length: int = HEADER_LENGTH.unpack(length_field)[0]
    if not 2 <= length <= file_bytes - HEADER_LENGTH.size:
        raise CorruptObjectError("the file is not a safetensors file: its header does not fit")
    if length > limit:
        raise CorruptObjectError(
            f"the file has a header of {length} bytes, of which {limit} are read here: cut it into more files"
        )
    return length


def parse_header(text: bytes, file_bytes: int) -> Header:
    """Checks a header against the size of its file. Raises CorruptObjectError."""
    try:
        document: object = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptObjectError("the safetensors header is not valid JSON, or repeats a key") from error
    if not isinstance(document, dict):
        raise CorruptObjectError("the safetensors header is not a JSON object")
    fields = cast("dict[str, object]", document)
    metadata = _parse_metadata(fields.pop(METADATA, {}))
    data_start = HEADER_LENGTH.size + len(text)
    parsed = {name: _parse_entry(name, value, data_start) for name, value in fields.items()}
    entries = dict(sorted(parsed.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = data_start
    for name, entry in entries.items():
        if entry.start != end:
            raise CorruptObjectError(f"{name[:80]!a} leaves a hole or overlaps another tensor in its file")
        end = entry.stop
    if end != file_bytes:
        raise CorruptObjectError("the file is longer or shorter than its safetensors header says")
    return Header(metadata=metadata, entries=entries)


def build_header(metadata: Mapping[str, str], entries: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length field and header for (name, dtype, shape) in file order, padded so that the data starts at 8 n bytes."""
    fields: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + prod(shape) * ITEM_BYTES[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return HEADER_LENGTH.pack(len(text)) + text


def _parse_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise CorruptObjectError("the safetensors metadata is not an object")
    metadata = cast("dict[str, object]", value)
    if any(not isinstance(text, str) for text in metadata.values()):
        raise CorruptObjectError("the safetensors metadata holds something that is not text")
    return cast("dict[str, str]", metadata)


def _parse_entry(name: str, value: object, data_start: int) -> Entry:
    where = f"{name[:80]!a} in the safetensors header"
    if not isinstance(value, dict):
        raise CorruptObjectError(f"{where} is not an object")
    fields = cast("dict[str, object]", value)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptObjectError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = fields["dtype"], _naturals(fields["shape"]), _naturals(fields["data_offsets"])
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CorruptObjectError(f"{where} has an unsupported type: {ascii(dtype)[:40]}")
    if (
        shape is None
        or len(shape) > MAX_DIMENSIONS
        or prod(shape) > MAX_ELEMENTS
        or offsets is None
        or len(offsets) != 2
    ):
        raise CorruptObjectError(f"{where} has an impossible shape or offsets")
    start, stop = offsets
    if stop - start != prod(shape) * ITEM_BYTES[dtype]:
        raise CorruptObjectError(f"{where} has {stop - start} bytes, which its type and shape do not fill")
    return Entry(dtype=dtype, shape=shape, start=data_start + start, stop=data_start + stop)


def _naturals(value: object) -> tuple[int, ...] | None:
    """A JSON list of whole numbers from 0 to MAX_ELEMENTS, or None. True is not a number."""
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    numbers = tuple(item for item in items if type(item) is int and 0 <= item <= MAX_ELEMENTS)
    return numbers if len(numbers) == len(items) else None


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, for `object_pairs_hook`. Raises ValueError."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is repeated")
    return fields


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")

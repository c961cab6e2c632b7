"""One part of an update as the bytes of a safetensors file (docs/weights.md has the format).

    __table__     zstd of JSON: the tensors that this part touches and how its chunks are cut from them
    __digests__   32 bytes per tensor of the table: BLAKE3 of its target bits
    NAME@START    one chunk's payload

The metadata's `check` is BLAKE3-256 of the whole file with the check's own 64 digits as zeros: no flipped bit survives.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from blake3 import blake3

from services.runtime.errors import BadInputError, CorruptObjectError, InputMissingError, StorageError
from services.wire.delta.container import HEADER_LENGTH, Header, build_header, header_bytes, parse_header, unique_keys
from services.wire.delta.layout import CHUNK_ELEMENTS, PART_BYTES, Chunk, PartLayout, Segment
from services.wire.delta.streams import compress, decompress
from services.wire.delta.tensors import ITEM_BYTES, TensorForm, check_form
from services.wire.delta.update import ROOT_CHARS, UpdateInfo, from_metadata, is_root, to_metadata

TABLE = "__table__"
DIGESTS = "__digests__"
DIGEST_BYTES = 32
CHECK_KEY = b'"check":"'
BLANK_CHECK = "0" * ROOT_CHARS
MAX_PART_HEADER_BYTES = 1 << 20
MAX_TABLE_BYTES = 4 << 20
MAX_PART_FILE_BYTES = PART_BYTES + (8 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A checked part: nothing in it has been decoded yet except the table."""

    info: UpdateInfo
    shard: int
    layout: PartLayout
    digests: dict[str, bytes]
    payloads: dict[str, memoryview]


def build_part(
    info: UpdateInfo, shard: int, layout: PartLayout, digests: Sequence[bytes], payloads: Sequence[bytes]
) -> bytes:
    """The file. `digests` go with the layout's forms, `payloads` with its chunks; an empty payload takes no entry."""
    blocks = {TABLE: compress(_table_text(layout)), DIGESTS: b"".join(digests)}
    for chunk, payload in zip(layout.chunks, payloads, strict=True):
        if payload:
            blocks[chunk.key] = payload
    metadata = {**to_metadata(info, shard), "check": BLANK_CHECK}
    head = build_header(metadata, [(key, "U8", (len(block),)) for key, block in blocks.items()])
    hasher = blake3(head)
    for block in blocks.values():
        hasher.update(block)
    mark = CHECK_KEY + BLANK_CHECK.encode()
    sealed = head.replace(mark, CHECK_KEY + hasher.hexdigest().encode(), 1)
    return b"".join((sealed, *blocks.values()))


def load_part(source: bytes | Path) -> bytes:
    """The bytes of a part. Raises InputMissingError, StorageError, or CorruptObjectError if it is too large."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        try:
            size = source.stat().st_size
        except FileNotFoundError as error:
            raise InputMissingError(f"there is no weight update at {source}") from error
        except OSError as error:
            raise StorageError(f"cannot read {source}: {error.strerror}") from error
    if size > MAX_PART_FILE_BYTES:
        raise CorruptObjectError(f"{size} bytes are too many for one part of a weight update")
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {source}: {error.strerror}") from error


def parse_part(data: bytes) -> Part:
    """Checks everything that can be checked without the base. Raises CorruptObjectError or InvalidWeightsError."""
    header, data_start = _header(data)
    _verify_check(data, data_start, header.metadata.get("check", ""))
    info, shard = from_metadata(header.metadata, len(data))
    blocks = _blocks(data, header)
    layout = _parse_table(decompress(blocks.pop(TABLE), MAX_TABLE_BYTES))
    digests = bytes(blocks.pop(DIGESTS))
    if len(digests) != DIGEST_BYTES * len(layout.forms):
        raise CorruptObjectError("a weight update does not have one digest per tensor")
    keys = {chunk.key for chunk in layout.chunks}
    if len(keys) != len(layout.chunks):
        raise CorruptObjectError("the table of a weight update names a chunk twice")
    if not blocks.keys() <= keys:
        raise CorruptObjectError("a weight update has chunks that its table does not name")
    sizes = {form.name: form.item_bytes for form in layout.forms}
    elements = sum(chunk.count for chunk in layout.chunks)
    model_bytes = sum(chunk.count * sizes[chunk.segments[0].name] for chunk in layout.chunks)
    if model_bytes > PART_BYTES or (model_bytes, elements) != (info.full_bytes, info.parameters):
        raise CorruptObjectError("a part of a weight update covers more than it may, or than it claims")
    digest_of_name = {
        form.name: digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] for index, form in enumerate(layout.forms)
    }
    return Part(info=info, shard=shard, layout=layout, digests=digest_of_name, payloads=blocks)


def read_info(data: bytes) -> UpdateInfo:
    """What the header of a part says, which nobody checked. Raises CorruptObjectError."""
    return from_metadata(_header(data)[0].metadata, len(data))[0]


def _header(data: bytes) -> tuple[Header, int]:
    """And where the data begin."""
    length = header_bytes(data[: HEADER_LENGTH.size], len(data), MAX_PART_HEADER_BYTES)
    stop = HEADER_LENGTH.size + length
    return parse_header(data[HEADER_LENGTH.size : stop], len(data)), stop


def _verify_check(data: bytes, data_start: int, check: str) -> None:
    mark = CHECK_KEY + check.encode("ascii", "replace")
    at = data.find(mark, 0, data_start)
    if not is_root(check) or at < 0 or data.find(mark, at + 1, data_start) >= 0:
        raise CorruptObjectError("a weight update has no check digest: it is damaged, or not a weight update")
    start = at + len(CHECK_KEY)
    whole = memoryview(data)
    hasher = blake3(whole[:start])
    hasher.update(BLANK_CHECK.encode())
    hasher.update(whole[start + ROOT_CHARS :])
    if hasher.hexdigest() != check:
        raise CorruptObjectError("a weight update is damaged: its check digest does not match, fetch the object again")


def _blocks(data: bytes, header: Header) -> dict[str, memoryview]:
    whole = memoryview(data)
    for name, entry in header.entries.items():
        if entry.dtype != "U8" or len(entry.shape) != 1:
            raise CorruptObjectError(f"the entry {name[:80]!a} of a weight update is not a row of bytes")
    blocks = {name: whole[entry.start : entry.stop] for name, entry in header.entries.items()}
    if TABLE not in blocks or DIGESTS not in blocks:
        raise CorruptObjectError("a weight update has no table of its tensors")
    return blocks


def _table_text(layout: PartLayout) -> bytes:
    numbers = {form.name: number for number, form in enumerate(layout.forms)}
    tensors = [[form.name, form.dtype, list(form.shape)] for form in layout.forms]
    chunks = [[[numbers[cut.name], cut.start, cut.count] for cut in chunk.segments] for chunk in layout.chunks]
    return json.dumps({"tensors": tensors, "chunks": chunks}, separators=(",", ":")).encode()


def _parse_table(text: bytes) -> PartLayout:
    try:
        document: object = json.loads(text, object_pairs_hook=unique_keys)
        if not isinstance(document, dict):
            raise TypeError("not an object")
        rows = cast("dict[str, list[list[object]]]", document)
        forms = tuple(_form(row) for row in rows["tensors"])
        cuts = cast("list[list[list[int]]]", rows["chunks"])
        chunks = tuple(_chunk(forms, cut) for cut in cuts)
    except BadInputError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise CorruptObjectError(f"the table of a weight update is damaged: {str(error)[:200]}") from error
    if len({form.name for form in forms}) != len(forms):
        raise CorruptObjectError("the table of a weight update names a tensor twice")
    return PartLayout(forms=forms, chunks=chunks)


def _form(row: list[object]) -> TensorForm:
    name, dtype, shape = row if len(row) == 3 else (None, None, None)
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError("a tensor is not described by name, type and shape")
    return check_form(name, dtype, cast("list[int]", shape))


def _chunk(forms: Sequence[TensorForm], cuts: list[list[int]]) -> Chunk:
    """Every segment lies inside its tensor, all have one dtype, and together they are not too many."""
    segments: list[Segment] = []
    dtypes: set[str] = set()
    for cut in cuts:
        if len(cut) != 3 or any(type(value) is not int for value in cut) or not 0 <= cut[0] < len(forms):
            raise TypeError("a chunk is not described by the numbers of a tensor, its first element and how many")
        number, start, count = cut
        form = forms[number]
        if start < 0 or count <= 0 or start + count > form.elements:
            raise CorruptObjectError(f"a chunk lies outside {form.name}: fetch the object again")
        segments.append(Segment(name=form.name, start=start, count=count))
        dtypes.add(form.dtype)
    chunk = Chunk(dtype=min(dtypes, default=""), segments=tuple(segments))
    if len(dtypes) != 1 or chunk.count > CHUNK_ELEMENTS or chunk.dtype not in ITEM_BYTES:
        raise CorruptObjectError("a chunk is empty, mixed or too large: fetch the object again")
    return chunk

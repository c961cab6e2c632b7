"""Checkpoints on disk: a .safetensors file, or a Hugging Face directory with one file or an index of several."""

import json
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import cast

import numpy as np

from services.runtime.errors import (
    BadInputError,
    CorruptObjectError,
    InputMissingError,
    InvalidWeightsError,
    StorageError,
)
from services.runtime.files import atomic_write_blocks, replaced
from services.wire.delta.container import HEADER_LENGTH, build_header, header_bytes, parse_header
from services.wire.delta.tensors import (
    BITS_TYPE,
    ITEM_BYTES,
    Bits,
    BitTensor,
    TensorForm,
    Weights,
    check_form,
    forms_of,
)
from services.wire.delta.update import FORMATS

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
MAX_INDEX_BYTES = 64 << 20
WRITE_BLOCK_BYTES = 8 << 20


def read_weights(path: str | Path, *, mapped: bool = False) -> dict[str, BitTensor]:
    """All tensors of a .safetensors file or of a Hugging Face directory.

    `mapped` maps the file instead of reading it: read-only, memory only for what is touched, and the file must stay
    as it is. Raises InputMissingError, CorruptObjectError, InvalidWeightsError or StorageError.
    """
    weights: dict[str, BitTensor] = {}
    files: dict[str, str] = {}
    for file in weight_files(Path(path)):
        for name, tensor in _read_file(file, mapped):
            if name in weights:
                raise CorruptObjectError(f"{name} is in two files of {path}")
            weights[name] = tensor
            files[name] = file.name
    index = Path(path) / INDEX_NAME
    for name, file_name in _weight_map(index).items() if index.is_file() else ():
        if name not in weights:
            raise CorruptObjectError(f"{name} is in the index of {path}, and in none of its files")
        if file_name != files[name]:
            raise CorruptObjectError(f"{name} is in {files[name]} of {path}, and not where the index says")
    return weights


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of `path`. Raises InputMissingError or BadInputError."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputMissingError(f"there are no weights at {path}: give a .safetensors file or a Hugging Face directory")
    if (path / INDEX_NAME).is_file():
        return [path / name for name in _indexed_names(path / INDEX_NAME)]
    if (path / SINGLE_NAME).is_file():
        return [path / SINGLE_NAME]
    raise InputMissingError(f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}: is it a Hugging Face model directory?")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file. Raises CorruptObjectError, InputMissingError or StorageError."""
    with _told(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_bytes(file.read(HEADER_LENGTH.size), size)
        return parse_header(file.read(length), size).metadata


def is_update(path: Path) -> bool:
    """Whether a .safetensors file is a part of an update. Raises as read_metadata."""
    return read_metadata(path).get("format") in FORMATS


def write_weights(weights: Weights, path: str | Path) -> None:
    """One .safetensors file, durable before it appears under its name. Raises StorageError or InvalidWeightsError."""
    forms, head = _file_of(forms_of(weights))
    atomic_write_blocks(Path(path), _blocks(head, [weights[form.name] for form in forms]))


@contextmanager
def weights_in_file(forms: Iterable[TensorForm], path: Path) -> Generator[dict[str, BitTensor]]:
    """Tensors to be filled, in a file that `write_weights` would have made and that gets its name when the block ends
    well: memory for what is touched, which the system may write out at any time. Raises StorageError.

    The room on disk is taken first: a mapped file has no way to say that there is none.
    """
    ordered, head = _file_of(forms)
    with replaced(path) as file:
        os.posix_fallocate(file.fileno(), 0, len(head) + sum(form.elements * form.item_bytes for form in ordered))
        file.write(head)
        file.flush()
        whole = np.memmap(file, np.uint8, mode="r+")
        tensors: dict[str, BitTensor] = {}
        start = len(head)
        for form in ordered:
            stop = start + form.elements * form.item_bytes
            bits = np.asarray(whole[start:stop]).view(BITS_TYPE[form.item_bytes])
            tensors[form.name] = BitTensor(dtype=form.dtype, shape=form.shape, bits=bits)
            start = stop
        yield tensors
        whole.flush()


def _file_of(forms: Iterable[TensorForm]) -> tuple[list[TensorForm], bytes]:
    """The order of the tensors in a file, and what comes before them."""
    ordered = sorted(forms, key=lambda form: (-form.item_bytes, form.name))
    return ordered, build_header({"format": "pt"}, [(form.name, form.dtype, form.shape) for form in ordered])


def _blocks(head: bytes, tensors: Iterable[BitTensor]) -> Iterator[bytes | memoryview]:
    yield head
    for tensor in tensors:
        data = tensor.bits.view(np.uint8)
        for start in range(0, data.size, WRITE_BLOCK_BYTES):
            yield memoryview(cast("bytes", data[start : start + WRITE_BLOCK_BYTES]))


def _indexed_names(index: Path) -> list[str]:
    """The files that an index names: only names beside it, never a path elsewhere."""
    names: set[str] = set()
    for name in _weight_map(index).values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(SUFFIX) or not _is_file_name(name):
            raise BadInputError(f"{index} names {ascii(name)[:80]}, which is not a .safetensors file beside it")
        names.add(name)
    return sorted(names)


def _is_file_name(name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _weight_map(index: Path) -> dict[str, object]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise BadInputError(f"{index} is too large for an index of weight files")
        document: object = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"{index} is not valid JSON") from error
    except OSError as error:
        raise StorageError(f"cannot read {index}: {error.strerror}") from error
    mapping = cast("dict[str, object]", document).get("weight_map") if isinstance(document, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise BadInputError(f"{index} has no weight_map from tensor names to files")
    return cast("dict[str, object]", mapping)


def _read_file(path: Path, mapped: bool) -> Iterator[tuple[str, BitTensor]]:
    with _told(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_bytes(file.read(HEADER_LENGTH.size), size)
        header = parse_header(file.read(length), size)
        if header.metadata.get("format") in FORMATS:
            raise BadInputError(f"{path} is a weight update, not weights: apply it to those that it was made from")
        whole = np.asarray(np.memmap(file, np.uint8, mode="r")) if mapped else None
        for name, entry in header.entries.items():
            form = check_form(name, entry.dtype, entry.shape)
            dtype = np.dtype(BITS_TYPE[ITEM_BYTES[entry.dtype]])
            if whole is None:
                bits = _read(file, entry.start, form.elements, dtype)
            else:
                bits = whole[entry.start : entry.start + form.elements * dtype.itemsize].view(dtype)
            yield name, BitTensor(dtype=form.dtype, shape=form.shape, bits=bits)


@contextmanager
def _told(path: Path) -> Generator[None]:
    """Errors of one file as errors of ours, with its name."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputMissingError(f"there is no file {path}") from error
    except (CorruptObjectError, InvalidWeightsError) as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _read(file: BufferedReader, start: int, count: int, dtype: "np.dtype[np.unsignedinteger]") -> Bits:
    bits = np.empty(count, dtype)
    file.seek(start)
    if file.readinto(cast("bytearray", bits.view(np.uint8))) != bits.nbytes:
        raise CorruptObjectError("the file was cut short while it was read")
    return bits

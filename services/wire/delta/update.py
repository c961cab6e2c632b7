"""What an update is: kind, versions, roots and sizes; and its text form in each part's safetensors metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, TypeVar

from services.runtime.errors import CorruptObjectError
from services.wire.delta.codec import Codec

FORMAT = "heterorl-weights/1"
FORMAT_WITHOUT_ROOT = "heterorl-weights/2"
"""Of a part that was made before the root was known that its update leads to: it does not name it."""
FORMATS = (FORMAT, FORMAT_WITHOUT_ROOT)
MAX_VERSION = (1 << 63) - 1
MAX_SHARDS = 1 << 20
MAX_RUN_ID_CHARS = 200
ROOT_CHARS = 64
HEX = frozenset("0123456789abcdef")

Member = TypeVar("Member", bound=StrEnum)


class UpdateKind(StrEnum):
    KEYFRAME = "keyframe"
    DELTA = "delta"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateInfo:
    """An update, or one part of it: then `changed`, `parameters` and the sizes are the part's.

    `bytes` is the size of the files, `full_bytes` of the model bytes they stand for; `changed` and `parameters` count
    elements. `base_version` and `base_root` are None for a keyframe. `target_root` is empty for a part that does not
    name it: the last one of an update always does.
    """

    kind: UpdateKind
    codec: Codec
    run_id: str
    base_version: int | None
    target_version: int
    base_root: str | None
    target_root: str
    shards: int
    bytes: int
    full_bytes: int
    changed: int
    parameters: int

    @property
    def ratio(self) -> float:
        """How many times smaller than the whole weights."""
        return self.full_bytes / self.bytes if self.bytes else 0.0

    def same_update(self, other: "UpdateInfo") -> bool:
        """Whether two parts belong to one update, as far as they say."""
        root = other.target_root if self.target_root and other.target_root else self.target_root
        sizes = {"bytes": 0, "full_bytes": 0, "changed": 0, "parameters": 0}
        return replace(self, **sizes) == replace(other, **sizes, target_root=root)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedUpdate:
    """An update in memory: each part is the bytes of one safetensors file of at most 64 MiB of model bytes."""

    info: UpdateInfo
    parts: tuple[bytes, ...]


def merge_infos(infos: Sequence[UpdateInfo]) -> UpdateInfo:
    """The whole of all parts of one update."""
    return replace(
        infos[0],
        target_root=max(info.target_root for info in infos),
        bytes=sum(info.bytes for info in infos),
        full_bytes=sum(info.full_bytes for info in infos),
        changed=sum(info.changed for info in infos),
        parameters=sum(info.parameters for info in infos),
    )


def to_metadata(info: UpdateInfo, shard: int) -> dict[str, str]:
    """The metadata of part `shard` (from 0). `bytes` is not in it: the file's own size says it."""
    metadata = {
        "format": FORMAT if info.target_root else FORMAT_WITHOUT_ROOT,
        "kind": info.kind.value,
        "codec": info.codec.value,
        "run_id": info.run_id,
        "target_version": str(info.target_version),
        "shard": str(shard),
        "shards": str(info.shards),
        "full_bytes": str(info.full_bytes),
        "changed": str(info.changed),
        "parameters": str(info.parameters),
    }
    if info.target_root:
        metadata["target_root"] = info.target_root
    if info.base_version is not None and info.base_root is not None:
        metadata["base_version"] = str(info.base_version)
        metadata["base_root"] = info.base_root
    return metadata


def from_metadata(metadata: Mapping[str, str], file_bytes: int) -> tuple[UpdateInfo, int]:
    """The part's info and its shard number. Raises CorruptObjectError."""
    found = metadata.get("format")
    if found not in FORMATS:
        raise CorruptObjectError(
            f"the file is not a weight update of this build: its format is {ascii(found)[:40]}, not {FORMATS[0]} or /2"
        )
    rootless = found == FORMAT_WITHOUT_ROOT
    kind = _member(metadata, "kind", UpdateKind)
    codec = _member(metadata, "codec", Codec)
    is_delta = kind is UpdateKind.DELTA
    names_base = {key in metadata for key in ("base_version", "base_root")}
    if names_base != {is_delta} or is_delta == (codec is Codec.KEYFRAME):
        raise CorruptObjectError("the metadata of a weight update contradicts itself: fetch the object again")
    run_id = metadata.get("run_id", "")
    if len(run_id) > MAX_RUN_ID_CHARS or not run_id.isprintable():
        raise CorruptObjectError("the run id of a weight update is not printable text")
    shards = _number(metadata, "shards", MAX_SHARDS)
    shard = _number(metadata, "shard", MAX_SHARDS)
    if shard >= shards:
        raise CorruptObjectError(f"a weight update has part {shard} of {shards}, counted from 0")
    if rootless and shard == shards - 1:
        raise CorruptObjectError("the last part of a weight update does not name the target_root")
    if rootless and "target_root" in metadata:
        raise CorruptObjectError("a part of a weight update names a target_root, which its format has not")
    info = UpdateInfo(
        kind=kind,
        codec=codec,
        run_id=run_id,
        base_version=_number(metadata, "base_version", MAX_VERSION) if is_delta else None,
        target_version=_number(metadata, "target_version", MAX_VERSION),
        base_root=_root(metadata, "base_root") if is_delta else None,
        target_root="" if rootless else _root(metadata, "target_root"),
        shards=shards,
        bytes=file_bytes,
        full_bytes=_number(metadata, "full_bytes", MAX_VERSION),
        changed=_number(metadata, "changed", MAX_VERSION),
        parameters=_number(metadata, "parameters", MAX_VERSION),
    )
    if info.changed > info.parameters:
        raise CorruptObjectError("a weight update changes more elements than it covers: fetch the object again")
    return info, shard


def is_root(text: str) -> bool:
    """Whether `text` has the form of a root digest: 64 lower-case hexadecimal digits."""
    return len(text) == ROOT_CHARS and HEX.issuperset(text)


def _root(metadata: Mapping[str, str], key: Literal["base_root", "target_root"]) -> str:
    text = metadata.get(key, "")
    if not is_root(text):
        raise CorruptObjectError(f"the {key} of a weight update is not a digest")
    return text


def _number(metadata: Mapping[str, str], key: str, limit: int) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= limit):
        raise CorruptObjectError(f"the {key} of a weight update is not a number from 0 to {limit}")
    return int(text)


def _member(metadata: Mapping[str, str], key: str, members: type[Member]) -> Member:
    text = metadata.get(key, "")
    for member in members:
        if member.value == text:
            return member
    raise CorruptObjectError(f"the {key} of a weight update is {ascii(text)[:40]}: this build does not know it")

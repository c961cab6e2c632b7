"""The manifest rows: one small file per published version, written after the version's objects are durable.

state_dir/versions/00000012.json   {"format": 1, "manifest": base64, "signature": base64, "update": {…} | null,
                                    "sha256": of the other fields}
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from services.runtime.errors import BadInputError
from services.runtime.files import atomic_write, storage_errors, sync_directory
from services.runtime.log import get_logger
from services.wire.convert import decode_manifest
from services.wire.objects import is_object_id
from services.wire.types import ObjectRef, PlanStep, SignedManifest, UpdateKind

_FORMAT = 1
_DIGEST = "sha256"

_log = get_logger("learner.versions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A published version and the update that was encoded for it; None where its weights equal the version before's,
    or where it was restored from a checkpoint."""

    manifest: SignedManifest
    update: PlanStep | None

    @property
    def number(self) -> int:
        return self.manifest.decoded.version

    @property
    def root(self) -> str:
        return self.manifest.decoded.root


class VersionFiles:
    """The rows on disk, all in memory too. Methods that write block, one thread at a time, and replace `rows`: readers
    on other threads see the old mapping or the new one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writing = threading.Lock()
        self.rows: dict[int, Version] = {}
        with storage_errors(f"use folder {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            for left_over in directory.glob(".*.tmp"):
                left_over.unlink(missing_ok=True)
            texts = {path: path.read_bytes() for path in sorted(directory.glob("*.json"))}
        for path, text in texts.items():
            try:
                version = _parse(text)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                _log.error("version_row_damaged", file=path.name, reason=error)
                continue
            self.rows[version.number] = version

    def write(self, version: Version) -> None:
        """Makes the row durable: from here on the version exists."""
        with self._writing:
            atomic_write(self._path(version.number), _render(version))
            self.rows = {**self.rows, version.number: version}

    def remove(self, numbers: Iterable[int]) -> None:
        """Forgets versions: collected, or undone by a restore."""
        gone = set(numbers)
        if not gone:
            return
        with self._writing:
            with storage_errors(f"remove versions in {self._directory}"):
                for number in gone:
                    self._path(number).unlink(missing_ok=True)
            sync_directory(self._directory)
            self.rows = {number: row for number, row in self.rows.items() if number not in gone}

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08d}.json"


def _render(version: Version) -> bytes:
    step = version.update
    update = step and {
        "kind": step.kind.name,
        "base_root": step.base_root,
        "target_root": step.target_root,
        "target_version": step.target_version,
        "objects": [[ref.object_id, ref.size_bytes] for ref in step.objects],
    }
    row = {
        "format": _FORMAT,
        "manifest": base64.b64encode(version.manifest.manifest).decode(),
        "signature": base64.b64encode(version.manifest.signature).decode(),
        "update": update,
    }
    return json.dumps({**row, _DIGEST: _digest(row)}, indent=1).encode()


def _digest(row: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _parse(text: bytes) -> Version:
    row = cast("Mapping[str, object]", json.loads(text))
    if row["format"] != _FORMAT:
        raise BadInputError(f"format {row['format']} is not {_FORMAT}")
    fields = {key: value for key, value in row.items() if key != _DIGEST}
    if row.get(_DIGEST, _digest(fields)) != _digest(fields):  # earlier releases wrote none
        raise BadInputError("it does not have its digest")
    manifest = base64.b64decode(str(row["manifest"]), validate=True)
    signed = SignedManifest(
        manifest=manifest,
        signature=base64.b64decode(str(row["signature"]), validate=True),
        decoded=decode_manifest(manifest),
    )
    update = cast("Mapping[str, object] | None", row["update"])
    return Version(manifest=signed, update=None if update is None else _parse_step(update))


def _parse_step(update: Mapping[str, object]) -> PlanStep:
    refs = [
        ObjectRef(object_id=object_id, size_bytes=size)
        for object_id, size in cast("list[tuple[str, int]]", update["objects"])
    ]
    if not all(is_object_id(ref.object_id) for ref in refs):
        raise BadInputError("a version row names something that is not an object")
    return PlanStep(
        kind=UpdateKind[str(update["kind"])],
        base_root=str(update["base_root"]),
        target_root=str(update["target_root"]),
        target_version=int(cast(int, update["target_version"])),
        objects=tuple(refs),
    )

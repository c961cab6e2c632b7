"""What a run leaves to read: metrics.jsonl, one line per step or evaluation, and summary.json at its end."""

import asyncio
import errno
import json
import math
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from services.runtime.files import atomic_write, storage_errors, sync_file
from services.runtime.log import get_logger

METRICS_NAME = "metrics.jsonl"
SUMMARY_NAME = "summary.json"

_READ_BYTES = 1 << 16
EVAL_ROUND = "eval_round"
"""Only an evaluation's line has it; its step is the version that the round began with."""

_log = get_logger("learner.records")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line: `step` optimizer steps had been taken, `wall_s` seconds since the learner started."""

    step: int
    wall_s: float
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    def line(self) -> bytes:
        """JSON has no NaN: a value that is not finite is left out."""
        finite = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        return json.dumps({"step": self.step, "wall_s": round(self.wall_s, 3), **finite}).encode() + b"\n"


class Records:
    """metrics.jsonl; many may follow it. Nothing of it stays in memory: a run may have a million steps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = asyncio.Event()

    def append(self, record: Record) -> None:
        """Adds a line, or raises StorageError and leaves the file as it was. Blocks for one short write. A crash can
        cut the last line short; it is dropped at the next start."""
        with storage_errors(f"write {self._path}"), self._path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                line = record.line()
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def sync(self) -> None:
        """Makes all lines durable, for a checkpoint: their steps are not taken again. Raises StorageError."""
        sync_file(self._path)

    def rewind_to(self, step: int) -> list[Record]:
        """Forgets what came after `step`: the learner was restored, and takes those steps again. Returns the
        evaluations that ended since that step and stay: the checkpoint may not know them."""
        with storage_errors(f"read {self._path}"):
            text = self._path.read_bytes() if self._path.is_file() else b""
        lines, kept = text.splitlines(keepends=True), list[Record]()
        while lines:
            record = _parse(lines.pop())
            if record is not None and record.step <= step:
                kept.insert(0, record)
                if EVAL_ROUND not in record.metrics:
                    break  # what stands before a step's line is of earlier steps: a long run's would take minutes
        atomic_write(self._path, b"".join((*lines, *(record.line() for record in kept))))
        return [record for record in kept if EVAL_ROUND in record.metrics]

    async def follow(self, from_step: int) -> AsyncIterator[Record]:
        """*Consumes* nothing; *waits for* new records; *produces* all from `from_step` on, in order; endless;
        *on cancel* nothing is lost. Call `rewind_to` first. Raises StorageError."""
        position = 0
        while True:
            changed = self._changed
            lines = await asyncio.to_thread(self._lines, position)
            for line in lines:
                position += len(line)
                record = _parse(line)
                if record is not None and record.step >= from_step:
                    yield record
            if not lines:
                await changed.wait()

    def _lines(self, position: int) -> list[bytes]:
        """Some whole lines from there on; none at the end."""
        with storage_errors(f"read {self._path}"), self._path.open("rb") as file:
            file.seek(position)
            return [line for line in file.readlines(_READ_BYTES) if line.endswith(b"\n")]


def _parse(line: bytes) -> Record | None:
    try:
        fields = cast("dict[str, float]", json.loads(line))
        step, wall_s = int(fields.pop("step")), float(fields.pop("wall_s"))
    except (ValueError, KeyError, TypeError, AttributeError):
        _log.warning("metrics_line_dropped", line=line[:80].decode(errors="replace"))
        return None
    return Record(step=step, wall_s=wall_s, metrics={name: float(value) for name, value in fields.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSummary:
    """A sampler as the summary shows it; docs/summary.md."""

    id: str
    version: int
    root: str
    groups: int
    tokens: int
    restarts: int
    bytes_received: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The keys of summary.json, in order; docs/summary.md says what each means."""

    steps: int
    wall_s: float
    loss: str
    accuracy_start: float | None
    accuracy_end: float | None
    max_staleness: int
    staleness_max: int
    staleness_histogram: Mapping[str, int]
    groups_trained: int
    groups_acknowledged: int
    groups_duplicate: int
    groups_dropped: Mapping[str, int]
    weights_bytes_full: int
    weights_bytes_sent: int
    delta_ratio_median: float
    learner_idle_share: float
    final_version: int
    final_root: str
    samplers: tuple[SamplerSummary, ...]


def write_summary(path: Path, summary: Summary) -> None:
    """One JSON object with exactly the keys of `Summary`. Raises StorageError."""
    fields: dict[str, object] = {name: getattr(summary, name) for name in Summary.__dataclass_fields__}
    fields["samplers"] = [
        {name: getattr(sampler, name) for name in SamplerSummary.__dataclass_fields__} for sampler in summary.samplers
    ]
    atomic_write(path, json.dumps(fields, indent=2, sort_keys=False).encode() + b"\n")

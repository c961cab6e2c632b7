"""The journal's file: its tables, how it is opened, and what a starting learner reads from it."""

import errno
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from services.learner.journal_rows import PURPOSE_EVAL, drop_reason
from services.learner.published import VersionRow
from services.learner.tally import Tally
from services.runtime.errors import ConfigError, DiskFullError, StorageError
from services.runtime.files import refusal_of
from services.wire.types import VerdictCode

_ValueT = TypeVar("_ValueT", int, str)

SCHEMA_VERSION = 1

_REFUSED_WRITES = frozenset({sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})
"""What SQLite makes of a used-up quota, and of no room for its shared memory; and of a disk that fails."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE streams (
    sampler_id TEXT, spool_id TEXT, last_seq INTEGER NOT NULL, PRIMARY KEY (sampler_id, spool_id)
) WITHOUT ROWID;
CREATE TABLE sessions (sampler_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE denied (sampler_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE versions (
    version INTEGER, root TEXT, learner_epoch INTEGER NOT NULL, retired INTEGER NOT NULL, PRIMARY KEY (version, root)
) WITHOUT ROWID;
-- Every group once, with its first verdict. The payload of a refused group is not kept.
CREATE TABLE groups (
    id INTEGER PRIMARY KEY,
    sampler_id TEXT NOT NULL, spool_id TEXT NOT NULL, seq INTEGER NOT NULL,
    group_id TEXT NOT NULL, content_sha256 BLOB NOT NULL,
    verdict INTEGER NOT NULL, reason TEXT NOT NULL,
    purpose INTEGER NOT NULL, lease_id TEXT NOT NULL, lease_number INTEGER NOT NULL, policy_version INTEGER NOT NULL,
    tokens INTEGER NOT NULL, longest INTEGER NOT NULL, arrived_unix_ms INTEGER NOT NULL,
    session_epoch INTEGER NOT NULL, learner_epoch INTEGER NOT NULL,
    trained_step INTEGER, staleness INTEGER, dropped_step INTEGER, dropped_reason TEXT,
    payload BLOB NOT NULL,
    UNIQUE (sampler_id, group_id), UNIQUE (sampler_id, spool_id, seq)
);
CREATE INDEX groups_pending ON groups (id) WHERE verdict = 1 AND purpose = 1 AND trained_step IS NULL
    AND dropped_reason IS NULL;
CREATE INDEX groups_tally ON groups (purpose, verdict, reason, dropped_reason, staleness);
CREATE INDEX groups_lease ON groups (lease_number) WHERE verdict = 1 AND purpose = 1 AND dropped_reason IS NULL;
CREATE INDEX groups_step ON groups (trained_step, dropped_step);
-- Envelopes that brought no new group: duplicates under another seq, and ids that came again with other content.
CREATE TABLE repeats (
    sampler_id TEXT, spool_id TEXT, seq INTEGER, verdict INTEGER NOT NULL, reason TEXT NOT NULL, first INTEGER NOT NULL,
    PRIMARY KEY (sampler_id, spool_id, seq)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What a starting learner reads."""

    learner_epoch: int
    versions: tuple[VersionRow, ...]
    denied: frozenset[str]
    heads: dict[tuple[str, str], int]
    """Last seq of each (sampler, spool)."""
    leases_next: int
    """Prompts below this number were granted at some time."""
    leases_floor: int
    """Prompts below this number are all answered or given up."""
    tally: Tally


def connect(path: Path, run_id: str) -> sqlite3.Connection:
    """Opens or makes the journal. Raises ConfigError for another run's or another release's, StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=True)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
            values = [("run_id", run_id), ("schema", SCHEMA_VERSION), ("learner_epoch", 0)]
            connection.executemany("INSERT INTO meta VALUES (?, ?)", values)
            connection.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        raise fault_of(path, error) from error
    if (owner := get_meta(connection, "run_id", "")) != run_id:
        connection.close()
        raise ConfigError(f"journal {path} belongs to run {owner!r}, not {run_id!r}: set another run.state_dir")
    if (schema := get_meta(connection, "schema", 0)) != SCHEMA_VERSION:
        connection.close()
        raise ConfigError(
            f"journal {path} has format {schema}, this release reads {SCHEMA_VERSION}: start the release that wrote "
            "it, or restore run.state_dir from a backup made before it ran"
        )
    return connection


def fault_of(path: Path, error: sqlite3.Error | OSError) -> StorageError:
    """What SQLite or the system says of the file, and what to do about it."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code in _REFUSED_WRITES and is_used_up(path.parent):
        return DiskFullError(f"journal {path} cannot be written ({error}): free disk space, or its quota")
    match code & 0xFF:
        case sqlite3.SQLITE_FULL:
            return DiskFullError(f"journal {path} cannot be written ({error}): free disk space")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return StorageError(
                f"journal {path} is damaged ({error}): restore run.state_dir from a backup, or move this file away to "
                "go on from the newest checkpoint without the groups that wait in it"
            )
        case _:
            return StorageError(f"journal {path} fails ({error}): check its disk and who may write there")


def is_used_up(directory: Path) -> bool:
    """Whether a file can be written there no more because the disk or a quota is used up."""
    return refusal_of(directory) in (errno.ENOSPC, errno.EDQUOT)


def get_meta(connection: sqlite3.Connection, key: str, default: _ValueT) -> _ValueT:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return type(default)(row[0]) if row else default


def put_meta(connection: sqlite3.Connection, key: str, value: int | str) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def read_tally(connection: sqlite3.Connection) -> Tally:
    tally = Tally()
    rows = connection.execute(
        "SELECT purpose, verdict, reason, dropped_reason, staleness, COUNT(*) FROM groups GROUP BY 1, 2, 3, 4, 5"
    )
    for purpose, verdict, reason, dropped, staleness, count in rows:
        if purpose == PURPOSE_EVAL:
            tally.evaluated += count
            continue
        tally.acknowledged += count
        if verdict != VerdictCode.ACCEPTED.value:
            tally.dropped[drop_reason(VerdictCode(verdict), reason)] += count
        elif dropped is not None:
            tally.dropped[dropped] += count
        elif staleness is not None:
            tally.trained += count
            tally.staleness[staleness] += count
    for verdict, reason, count in connection.execute("SELECT verdict, reason, COUNT(*) FROM repeats GROUP BY 1, 2"):
        if verdict == VerdictCode.DUPLICATE.value:
            tally.duplicates += count
        else:
            tally.acknowledged += count
            tally.dropped[drop_reason(VerdictCode(verdict), reason)] += count
    tally.duplicates += get_meta(connection, "resent", 0)
    return tally


def recover(connection: sqlite3.Connection, known_epoch: int) -> Recovered:
    """Raises the learner's epoch, durably, and reads what a start needs. `known_epoch` is known from elsewhere: the
    journal may be a new one, or an older copy."""
    epoch = max(get_meta(connection, "learner_epoch", 0), known_epoch) + 1
    put_meta(connection, "learner_epoch", epoch)
    versions = connection.execute("SELECT version, root, retired FROM versions ORDER BY version DESC LIMIT 16384")
    return Recovered(
        learner_epoch=epoch,
        versions=tuple(VersionRow(version=row[0], root=row[1], retired=bool(row[2])) for row in versions),
        denied=frozenset(row[0] for row in connection.execute("SELECT sampler_id FROM denied")),
        heads={(row[0], row[1]): row[2] for row in connection.execute("SELECT * FROM streams")},
        leases_next=get_meta(connection, "leases_next", 0),
        leases_floor=get_meta(connection, "leases_floor", 0),
        tally=read_tally(connection),
    )

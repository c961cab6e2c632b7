"""The spool's SQLite file. Synchronous; one connection, used by one thread only (`spool.Spool` owns that thread)."""

import errno
import hashlib
import os
import sqlite3
import time
import uuid
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

from services.runtime import failpoints
from services.runtime.errors import ConfigError, DiskFullError, StorageError
from services.runtime.files import refusal_of, sync_directory
from services.runtime.log import get_logger
from services.wire.types import GroupEnvelope

_log = get_logger("sampler.spool")
_SCHEMA = """
CREATE TABLE meta (spool_id TEXT NOT NULL, run_id TEXT NOT NULL, sampler_id TEXT NOT NULL DEFAULT '');
CREATE TABLE groups (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    group_id TEXT NOT NULL UNIQUE,
    content_sha256 BLOB NOT NULL,
    payload BLOB NOT NULL
);
"""
_FORMAT = 1
_REFUSED_WRITES = frozenset({sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})
"""What SQLite makes of a used-up quota, and of no room for its shared memory; and of a disk that fails. Unlike after a
failed fsync, nothing was taken for written."""
_NO_ROOM = (0, errno.ENOSPC, errno.EDQUOT)
"""What a small file beside it says then: 0 where there is room for that, and was none for a group."""


def uuid7(unix_ms: int, random_bytes: bytes) -> str:
    """UUID version 7 (RFC 9562): 48 bits of time, then random bits (10 bytes are used)."""
    bits = int.from_bytes(random_bytes[:10], "big")
    high = (unix_ms & (1 << 48) - 1) << 80
    value = high | 0x7 << 76 | (bits >> 64 & 0xFFF) << 64 | 0b10 << 62 | bits & (1 << 62) - 1
    return str(uuid.UUID(int=value))


class SpoolFile:
    """Groups in order of seq. Every method raises DiskFullError when the disk is full, with nothing written, and
    StorageError when it fails: the process must end then, since after a failed fsync the kernel may report the next one
    as good though pages were lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._take(self._open())

    def bind(self, run_id: str, sampler_id: str) -> None:
        """Makes this the spool of a sampler in a run; that of another is renamed and a new one begun: its groups answer
        leases that this sampler never had. Writes nothing where it is that: a full disk must not end a sampler that
        registers again."""
        if (self.run_id, self.sampler_id) == (run_id, sampler_id):
            return
        if self.run_id not in ("", run_id) or self.sampler_id not in ("", sampler_id):
            same_run = self.run_id == run_id
            self._set_aside(f"sampler-{self.sampler_id}" if same_run else f"run-{self.run_id}")
            self._take(self._open())
        with _storage("write", self._path), self._db:
            self._db.execute("UPDATE meta SET run_id = ?, sampler_id = ?", (run_id, sampler_id))
        self.run_id, self.sampler_id = run_id, sampler_id

    def _take(self, db: sqlite3.Connection) -> None:
        self._db = db
        row = db.execute("SELECT spool_id, run_id, sampler_id FROM meta").fetchone()
        self.spool_id, self.run_id, self.sampler_id = row

    def append(self, payload: bytes) -> int:
        """The group's seq, once it is on disk."""
        row = (uuid7(time.time_ns() // 1_000_000, os.urandom(10)), hashlib.sha256(payload).digest(), payload)
        with _storage("write", self._path), self._db:
            cursor = self._db.execute("INSERT INTO groups (group_id, content_sha256, payload) VALUES (?, ?, ?)", row)
            failpoints.hit("spool.before_commit")
        failpoints.hit("spool.after_commit")
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def read_from(self, seq: int, max_bytes: int) -> list[GroupEnvelope]:
        """Groups from `seq` on, up to max_bytes of payload but one at least."""
        found: list[GroupEnvelope] = []
        size = 0
        query = "SELECT seq, group_id, content_sha256, payload FROM groups WHERE seq >= ? ORDER BY seq"
        with _storage("read", self._path), closing(self._db.execute(query, (seq,))) as rows:
            for number, group_id, digest, payload in rows:
                size += len(payload)
                if found and size > max_bytes:
                    break
                found.append(GroupEnvelope(seq=number, group_id=group_id, content_sha256=digest, payload=payload))
        return found

    def delete_through(self, seq: int) -> None:
        """Forgets acknowledged groups."""
        with _storage("write", self._path), self._db:
            self._db.execute("DELETE FROM groups WHERE seq <= ?", (seq,))
            failpoints.hit("spool.before_delete_commit")

    def renumber(self) -> None:
        """A new spool id with seqs from 1: for a learner that has lost what it had acknowledged."""
        spool_id = str(uuid.uuid4())
        with _storage("write", self._path), self._db:
            first = self._db.execute("SELECT MIN(seq) FROM groups").fetchone()[0] or 1
            # Through negative numbers: an UPDATE that shifts keys downwards may meet keys that are still in place.
            self._db.execute("UPDATE groups SET seq = -(seq - ?)", (first - 1,))
            self._db.execute("UPDATE groups SET seq = -seq")
            last = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM groups").fetchone()[0]
            self._db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'groups'", (last,))
            self._db.execute("UPDATE meta SET spool_id = ?", (spool_id,))
        self.spool_id = spool_id

    def measure(self) -> tuple[int, int, int, int]:
        """(groups, bytes of payload, lowest seq or 0, seq of the next group)."""
        with _storage("read", self._path):
            query = "SELECT COUNT(*), COALESCE(SUM(LENGTH(payload)), 0), COALESCE(MIN(seq), 0) FROM groups"
            groups, size, first = self._db.execute(query).fetchone()
            last = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'groups'").fetchone()
        return groups, size, first, 1 + (0 if last is None else last[0])

    def close(self) -> None:
        self._db.close()

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise _fault(f"cannot open {self._path}", error, self._path) from error
            _log.error("spool_damaged", path=self._path, error=error)
            self._rename("damaged")
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, check_same_thread=False)
        try:
            if (written := db.execute("PRAGMA user_version").fetchone()[0]) not in (0, _FORMAT):
                raise ConfigError(
                    f"spool {self._path} has format {written}, this release reads {_FORMAT}: start the release that "
                    "wrote it, or move the file away with the groups that wait in it"
                )
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            if written == 0:
                with db:
                    db.executescript("BEGIN;" + _SCHEMA)
                    db.execute("INSERT INTO meta VALUES (?, '', '')", (str(uuid.uuid4()),))
                    db.execute(f"PRAGMA user_version = {_FORMAT}")
                sync_directory(self._path.parent)
            if (found := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
            tables = "SELECT COUNT(*) FROM sqlite_master WHERE name IN ('meta', 'groups', 'sqlite_sequence')"
            if db.execute(tables).fetchone()[0] < 3 or db.execute("SELECT COUNT(*) FROM meta").fetchone()[0] != 1:
                raise sqlite3.DatabaseError("a table is missing")
            if not db.execute("SELECT 1 FROM pragma_table_info('meta') WHERE name = 'sampler_id'").fetchone():
                db.execute("ALTER TABLE meta ADD COLUMN sampler_id TEXT NOT NULL DEFAULT ''")  # of an earlier release
        except BaseException:
            db.close()
            raise
        return db

    def _set_aside(self, reason: str) -> None:
        groups, size, *_ = self.measure()
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        kept = self._rename(reason)
        found = {"run_id": self.run_id, "sampler_id": self.sampler_id, "groups": groups, "bytes": size}
        _log.warning("spool_set_aside", kept=kept, **found)

    def _rename(self, reason: str) -> Path:
        kept = self._path.with_name(f"{self._path.stem}.{reason}.{time.time_ns()}{self._path.suffix}")
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + suffix)
            if part.exists():
                part.rename(kept.with_name(kept.name + suffix))
        return kept


@contextmanager
def _storage(what: str, path: Path) -> Generator[None]:
    """Turns SQLite's errors into DiskFullError or StorageError."""
    try:
        yield
    except sqlite3.Error as error:
        raise _fault(f"cannot {what} the spool", error, path) from error


def _fault(failure: str, error: sqlite3.Error, path: Path) -> StorageError:
    code, reason = getattr(error, "sqlite_errorcode", 0), ""
    full = code & 0xFF == sqlite3.SQLITE_FULL
    if code in _REFUSED_WRITES:
        refusal = refusal_of(path.parent)
        full, reason = refusal in _NO_ROOM, f" ({os.strerror(refusal)})"
    if full:
        return DiskFullError(f"{failure}: {error}; free disk space, or its quota")
    return StorageError(f"{failure}: {error}{reason}; check the disk and who may write there")

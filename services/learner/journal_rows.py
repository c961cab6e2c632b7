"""Rows of the journal: what one group, or one repeat of a group, looks like on its way in and out."""

import sqlite3
from dataclasses import dataclass

from services.runtime.errors import StorageError
from services.wire.types import VerdictCode

PURPOSE_TRAIN = 1
PURPOSE_EVAL = 2
_MAX_INT = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """A new group with its verdict, as the journal writes it."""

    sampler_id: str
    spool_id: str
    seq: int
    session_epoch: int
    group_id: str
    content_sha256: bytes
    verdict: VerdictCode
    reason: str
    purpose: int
    """PURPOSE_TRAIN or PURPOSE_EVAL; TRAIN also for what does not parse."""
    lease_id: str
    lease_number: int
    """Number of the prompt in the run's order; -1 for none."""
    policy_version: int
    tokens: int
    """Completion tokens of the group."""
    longest: int
    """Tokens of its longest completion."""
    arrived_unix_ms: int
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatRow:
    sampler_id: str
    spool_id: str
    seq: int
    verdict: VerdictCode
    reason: str
    first: VerdictCode
    fresh: bool
    """True when the envelope also counts as a group of its own that was dropped (ID_REUSE)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """What the journal says of a group that came before."""

    verdict: VerdictCode
    reason: str
    content_sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRow:
    """An accepted group that is neither trained nor dropped."""

    id: int
    sampler_id: str
    lease_number: int
    policy_version: int
    payload: bytes
    sound: bool
    """Whether the payload still has its digest."""


def drop_reason(verdict: VerdictCode, reason: str) -> str:
    """Key of `Tally.dropped` for a group that was refused on arrival: "STALE", "INVALID/LOGPROB_POSITIVE"."""
    return f"{verdict.name}/{reason}" if verdict is VerdictCode.INVALID else verdict.name


def find(
    connection: sqlite3.Connection, sampler_id: str, spool_id: str, seq: int, group_id: str
) -> tuple[First | None, First | None]:
    by_id = connection.execute(
        "SELECT verdict, reason, content_sha256 FROM groups WHERE sampler_id = ? AND group_id = ?",
        (sampler_id, group_id),
    ).fetchone()
    by_seq = connection.execute(
        "SELECT verdict, reason, content_sha256 FROM groups WHERE sampler_id = ? AND spool_id = ? AND seq = ? "
        "UNION ALL SELECT CASE verdict WHEN 2 THEN first ELSE verdict END, reason, x'' FROM repeats "
        "WHERE sampler_id = ? AND spool_id = ? AND seq = ?",
        (sampler_id, spool_id, min(seq, _MAX_INT)) * 2,
    ).fetchone()
    return _first(by_seq), _first(by_id)


def _first(row: tuple[int, str, bytes] | None) -> First | None:
    return First(verdict=VerdictCode(row[0]), reason=row[1], content_sha256=row[2]) if row else None


def insert_group(connection: sqlite3.Connection, row: GroupRow, learner_epoch: int) -> int:
    done = connection.execute(
        "INSERT INTO groups VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL, NULL, NULL, ?)",
        (
            row.sampler_id,
            row.spool_id,
            row.seq,
            row.group_id,
            row.content_sha256,
            row.verdict.value,
            row.reason,
            row.purpose,
            row.lease_id,
            row.lease_number,
            min(row.policy_version, _MAX_INT),
            row.tokens,
            row.longest,
            row.arrived_unix_ms,
            row.session_epoch,
            learner_epoch,
            row.payload,
        ),
    )
    if done.lastrowid is None:
        raise StorageError("the journal gave a group no row id: this is a fault of ours")
    return done.lastrowid


def insert_repeat(connection: sqlite3.Connection, row: RepeatRow) -> None:
    connection.execute(
        "INSERT INTO repeats VALUES (?, ?, ?, ?, ?, ?)",
        (row.sampler_id, row.spool_id, row.seq, row.verdict.value, row.reason, row.first.value),
    )

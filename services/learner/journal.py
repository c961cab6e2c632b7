"""The learner's durable record of groups: nothing is acknowledged before it is here.

SQLite in WAL mode, synchronous=FULL, one connection in one thread (two writing connections can corrupt a WAL before
SQLite 3.51.3). Every method is one transaction that is on disk when the call returns.

A group's life:  commit (with its verdict) ──► mark_trained | mark_dropped          rewind_to undoes the last arrow
"""

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, TypeVar

from services.learner import journal_rows as rows
from services.learner import journal_schema as schema
from services.learner.journal_rows import First, GroupRow, PendingRow, RepeatRow, drop_reason
from services.learner.journal_schema import Recovered
from services.learner.tally import Tally
from services.runtime.errors import DiskFullError, HeteroRLError, StorageError
from services.runtime.failpoints import hit
from services.wire.types import VerdictCode

_T = TypeVar("_T")

FUTURE_VERSION = "FUTURE_VERSION"
"""Why groups leave the buffer that were drawn by versions which a restored learner has not made yet."""
DAMAGED = "DAMAGED"
"""Why groups leave the buffer whose bytes changed on the disk."""
OLDER_JOURNAL = "OLDER_JOURNAL"
"""Why groups leave it that wait in a journal older than the checkpoint, which may have been trained on them."""
OTHER_SETTINGS = "OTHER_SETTINGS"
"""Why groups leave it that were drawn by the settings of before the learner was started again."""


class Journal:
    """Made by `open`. After an I/O error other than a full disk it refuses all work: the process must restart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tally = Tally()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._connection: sqlite3.Connection | None = None
        self._broken: StorageError | None = None
        self._failed = asyncio.Event()
        self._epoch = 0

    @classmethod
    async def open(cls, path: Path, run_id: str, known_epoch: int = 0) -> tuple["Journal", Recovered]:
        """Opens or makes the file and raises the learner's epoch, above `known_epoch`.

        Raises ConfigError for a journal of another run or format, StorageError when the disk fails.
        """
        journal = cls(path)
        loop = asyncio.get_running_loop()

        def start() -> Recovered:
            journal._connection = schema.connect(path, run_id)
            return journal._transact(lambda connection: schema.recover(connection, known_epoch))

        try:
            recovered = await loop.run_in_executor(journal._thread, start)
        except BaseException:
            journal._thread.shutdown(wait=False)
            raise
        journal.tally = recovered.tally
        journal._epoch = recovered.learner_epoch
        return journal, recovered

    async def close(self) -> None:
        def stop() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await asyncio.get_running_loop().run_in_executor(self._thread, stop)
        self._thread.shutdown()

    @property
    def broken(self) -> StorageError | None:
        """The fault after which nothing may be trusted to this process any more."""
        return self._broken

    async def fail(self) -> NoReturn:
        """*Waits for* that fault and raises it: whoever meets it first may be a call that nobody would hear of."""
        await self._failed.wait()
        raise self._broken or StorageError(f"journal {self.path} failed")

    async def find(self, keys: Sequence[tuple[str, str, int, str]]) -> list[tuple[First | None, First | None]]:
        """For each (sampler, spool, seq, group id): what came before under that seq, and under that id."""
        return await self._run(lambda connection: [rows.find(connection, *key) for key in keys])

    async def commit(self, groups: Sequence[GroupRow], repeats: Sequence[RepeatRow], resent: int = 0) -> list[int]:
        """Writes new groups, repeats and the streams' last seq in one transaction; returns the groups' ids, in order.

        `resent` counts duplicates that came under a seq that the journal already holds.
        """

        def write(connection: sqlite3.Connection) -> list[int]:
            ids = [rows.insert_group(connection, group, self._epoch) for group in groups]
            for repeat in repeats:
                rows.insert_repeat(connection, repeat)
            for row in (*groups, *repeats):
                connection.execute(
                    "INSERT INTO streams VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET last_seq = "
                    "MAX(last_seq, excluded.last_seq)",
                    (row.sampler_id, row.spool_id, row.seq),
                )
            if resent:
                schema.put_meta(connection, "resent", schema.get_meta(connection, "resent", 0) + resent)
            hit("journal.before_commit")
            return ids

        ids = await self._run(write)
        try:
            hit("journal.after_commit")
        except StorageError as error:  # durable, and yet nobody knows: only a restart finds these groups again
            self._broken = error
            self._failed.set()
            raise
        self._count_commit(groups, repeats, resent)
        return ids

    async def mark_trained(self, groups: Sequence[tuple[int, int]], step: int) -> None:
        """Records (id, staleness in versions) as trained at `step`. All must be pending: each trains at most once."""

        def write(connection: sqlite3.Connection) -> None:
            for row_id, staleness in groups:
                done = connection.execute(
                    "UPDATE groups SET trained_step = ?, staleness = ? WHERE id = ? AND verdict = 1 AND purpose = 1 "
                    "AND trained_step IS NULL AND dropped_reason IS NULL",
                    (step, staleness, row_id),
                )
                if done.rowcount != 1:
                    raise HeteroRLError(f"group {row_id} of the journal is not pending: it cannot train at step {step}")
            hit("journal.before_mark_trained")

        await self._run(write)
        self.tally.trained += len(groups)
        self.tally.staleness.update(staleness for _, staleness in groups)

    async def mark_dropped(self, groups: Sequence[tuple[int, str]], step: int) -> None:
        """Records (id, reason) as dropped before `step`; a group that is not pending stays what it is."""

        def write(connection: sqlite3.Connection) -> list[str]:
            return [
                reason
                for row_id, reason in groups
                if connection.execute(
                    "UPDATE groups SET dropped_reason = ?, dropped_step = ? WHERE id = ? AND verdict = 1 "
                    "AND trained_step IS NULL AND dropped_reason IS NULL",
                    (reason, step, row_id),
                ).rowcount
            ]

        self.tally.dropped.update(await self._run(write))

    async def rewind_to(self, step: int, version: int) -> None:
        """Back to the state after `step`, whose checkpoint holds policy `version`.

        What was trained or dropped later is pending again, except groups of versions that do not exist any more:
        those are dropped as FUTURE_VERSION. A group stays dropped whose prompt was granted again and answered since:
        that prompt would be trained twice, and granted a third time.
        """

        def write(connection: sqlite3.Connection) -> Tally:
            connection.execute(
                "UPDATE groups SET trained_step = NULL, staleness = NULL WHERE trained_step > ?", (step,)
            )
            dropped = connection.execute(
                # By an index: a scan would read all payloads' pages, minutes of a large journal at each start.
                # An answer of a version that does not exist any more counts for none.
                "SELECT lease_number, id FROM groups WHERE purpose = 1 AND verdict = 1 "
                "AND reason = '' AND dropped_reason > '' AND dropped_step > ? AND NOT EXISTS (SELECT 1 FROM groups "
                "AS later WHERE later.verdict = 1 AND later.purpose = 1 AND later.dropped_reason IS NULL "
                "AND later.lease_number = groups.lease_number AND later.policy_version <= ?) "
                "ORDER BY policy_version <= ?, id",
                (step, version, version),
            )
            connection.executemany(
                "UPDATE groups SET dropped_step = NULL, dropped_reason = NULL WHERE id = ?",
                [(row_id,) for row_id in dict(dropped).values()],  # of each prompt the last
            )
            connection.execute(
                "UPDATE groups SET dropped_step = ?, dropped_reason = ? WHERE verdict = 1 AND purpose = 1 "
                "AND trained_step IS NULL AND dropped_reason IS NULL AND policy_version > ?",
                (step, FUTURE_VERSION, version),
            )
            connection.execute("UPDATE versions SET retired = 1 WHERE version > ?", (version,))
            return schema.read_tally(connection)

        self.tally = await self._run(write)

    async def pending(self) -> list[PendingRow]:
        """Accepted groups that are neither trained nor dropped, in order of arrival."""
        found = await self._run(
            lambda connection: connection.execute(
                "SELECT id, sampler_id, lease_number, policy_version, payload, content_sha256 FROM groups "
                "WHERE verdict = 1 AND purpose = 1 AND trained_step IS NULL AND dropped_reason IS NULL ORDER BY id"
            ).fetchall()
        )
        return [
            PendingRow(
                id=row[0],
                sampler_id=row[1],
                lease_number=row[2],
                policy_version=row[3],
                payload=row[4],
                sound=hashlib.sha256(row[4]).digest() == row[5],
            )
            for row in found
        ]

    async def answered(self, floor: int) -> set[int]:
        """Numbers, from `floor` on, of prompts whose accepted group was not dropped."""
        found = await self._run(
            lambda connection: connection.execute(
                "SELECT lease_number FROM groups WHERE verdict = 1 AND purpose = 1 AND dropped_reason IS NULL "
                "AND lease_number >= ?",
                (floor,),
            ).fetchall()
        )
        return {row[0] for row in found}

    async def lost(self) -> set[int]:
        """Numbers of prompts whose accepted groups were all dropped, one of them by a restart."""
        reasons = (FUTURE_VERSION, DAMAGED, OTHER_SETTINGS)
        found = await self._run(
            lambda connection: connection.execute(
                "SELECT lease_number FROM groups AS gone WHERE purpose = 1 AND verdict = 1 AND reason = '' "
                "AND dropped_reason IN (?, ?, ?) AND NOT EXISTS (SELECT 1 FROM groups WHERE verdict = 1 "
                "AND purpose = 1 AND dropped_reason IS NULL AND lease_number = gone.lease_number)",
                reasons,
            ).fetchall()
        )
        return {row[0] for row in found}

    async def record_leases(self, following: int, floor: int) -> None:
        """Before prompts below `following` are handed out: a restarted learner then knows that they may be at work."""

        def write(connection: sqlite3.Connection) -> None:
            schema.put_meta(connection, "leases_next", following)
            schema.put_meta(connection, "leases_floor", floor)

        await self._run(write)

    async def record_version(self, version: int, root: str) -> None:
        row = (version, root, self._epoch)
        await self._run(
            lambda connection: connection.execute("INSERT OR REPLACE INTO versions VALUES (?, ?, ?, 0)", row)
        )

    async def raise_session_epoch(self, sampler_id: str) -> int:
        """The next session epoch of this id, from 1."""
        row = await self._run(
            lambda connection: connection.execute(
                "INSERT INTO sessions VALUES (?, 1) ON CONFLICT DO UPDATE SET epoch = epoch + 1 RETURNING epoch",
                (sampler_id,),
            ).fetchall()
        )
        return int(row[0][0])

    async def raise_eval_round(self) -> int:
        """The next evaluation round, from 1."""

        def write(connection: sqlite3.Connection) -> int:
            number = schema.get_meta(connection, "eval_round", 0) + 1
            schema.put_meta(connection, "eval_round", number)
            return number

        return await self._run(write)

    async def set_denied(self, sampler_id: str, denied: bool) -> None:
        statement = "INSERT OR IGNORE INTO denied VALUES (?)" if denied else "DELETE FROM denied WHERE sampler_id = ?"
        await self._run(lambda connection: connection.execute(statement, (sampler_id,)))

    def _count_commit(self, groups: Iterable[GroupRow], repeats: Iterable[RepeatRow], resent: int) -> None:
        self.tally.duplicates += resent
        for group in groups:
            if group.purpose == rows.PURPOSE_EVAL:
                self.tally.evaluated += 1
                continue
            self.tally.acknowledged += 1
            if group.verdict is not VerdictCode.ACCEPTED:
                self.tally.dropped[drop_reason(group.verdict, group.reason)] += 1
        for repeat in repeats:
            if repeat.fresh:
                self.tally.acknowledged += 1
                self.tally.dropped[drop_reason(repeat.verdict, repeat.reason)] += 1
            else:
                self.tally.duplicates += 1

    async def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)
        finally:
            if self._broken is not None:
                self._failed.set()

    def _transact(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """One transaction, in the journal's thread. Raises StorageError, with nothing written."""
        if self._broken is not None or self._connection is None:
            raise self._broken or StorageError(f"journal {self.path} is closed")
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            fault = schema.fault_of(self.path, error)
            if not isinstance(fault, DiskFullError):
                # After a failed fsync the kernel may report the next one as good though pages were lost.
                self._broken = fault
            raise fault from error
        return result

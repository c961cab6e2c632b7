"""Arriving groups: judged, committed together, then acknowledged and handed on.

    submit ─► queue ─► up to 32 groups or 20 ms ─► known before? ─► inspect ─► judge ─► ONE transaction ─► outcomes
                                                                                         └► buffer, evaluation, leases

One task does all of it in order. The caller may go away at any time: what is in the queue is committed all the same,
and a group whose acknowledgement was lost is a duplicate when it comes again.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from services.learner.admission import Fault, FormRules, Inspected, Judgement, inspect, judge
from services.learner.disk_room import DiskRoom
from services.learner.journal import Journal
from services.learner.journal_rows import PURPOSE_EVAL, PURPOSE_TRAIN, First, GroupRow, RepeatRow
from services.learner.leases import LeaseTable
from services.learner.published import PublishedVersions
from services.learner.sessions import Sampler, Sessions
from services.learner.work import LeaseName, Work
from services.runtime.errors import DiskFullError, StorageError
from services.runtime.log import get_logger
from services.wire.types import GroupEnvelope, LeasePurpose, ScoredGroup, Verdict, VerdictCode

_log = get_logger("learner.intake")
_GROUPS_PER_COMMIT = 32
_GROUPS_TO_COMMIT_AT_ONCE = 8
_GATHER_S = 0.02
_QUEUED_GROUPS = 256
_ALARMING = frozenset({Fault.ID_REUSE, Fault.UNKNOWN_ROOT, Fault.NEVER_LEASED})
"""Faults that an honest sampler with sound hardware never has."""
_AFTER_RESTART = frozenset(
    {
        *(Fault.NEVER_LEASED, Fault.OTHER_PROMPT, Fault.OTHER_PURPOSE, Fault.UNKNOWN_ROOT),
        *(Fault.PROMPT_TOO_LONG, Fault.COMPLETION_TOO_LONG, Fault.WRONG_GROUP_SIZE, Fault.WRONG_TEMPERATURE),
    }
)
"""Faults that a group of an earlier learner epoch may have through the learner's doing: it was restored from a backup
older than the group, or started again with other settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    sampler_id: str
    session_epoch: int
    spool_id: str
    envelope: GroupEnvelope


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The envelope's seq lies beyond the expected one: nothing was done with it."""

    expected_seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """An accepted group after its commit."""

    id: int
    sampler_id: str
    work: Work
    group: ScoredGroup
    payload: bytes


@dataclass(slots=True, kw_only=True)
class _Entry:
    arrival: Arrival | None
    """None for a barrier."""
    future: asyncio.Future[Verdict | Gap]


@dataclass(slots=True, kw_only=True)
class _Draft:
    """The transaction in the making; effects on other parts wait until it is on disk."""

    groups: list[GroupRow] = field(default_factory=list[GroupRow])
    repeats: list[RepeatRow] = field(default_factory=list[RepeatRow])
    resent: int = 0
    heads: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    by_seq: dict[tuple[str, str, int], First] = field(default_factory=dict[tuple[str, str, int], First])
    by_id: dict[tuple[str, str], First] = field(default_factory=dict[tuple[str, str], First])
    accepted: dict[int, tuple[Work, ScoredGroup]] = field(default_factory=dict[int, tuple[Work, ScoredGroup]])
    """By index in `groups`."""
    refused: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(lease id, sampler id)"""


class Intake:
    """`deliver` gets the accepted groups of each transaction after it is on disk."""

    def __init__(
        self,
        *,
        journal: Journal,
        heads: dict[tuple[str, str], int],
        form: FormRules,
        max_staleness: int,
        versions: PublishedVersions,
        leases: LeaseTable,
        sessions: Sessions,
        room: DiskRoom,
        deliver: Callable[[Sequence[Accepted]], None],
        unix_ms: Callable[[], int],
    ) -> None:
        self._journal = journal
        self._heads = dict(heads)
        self._form = form
        self._max_staleness = max_staleness
        self._versions = versions
        self._leases = leases
        self._sessions = sessions
        self._room = room
        self._deliver = deliver
        self._unix_ms = unix_ms
        self._queue: asyncio.Queue[_Entry] = asyncio.Queue(_QUEUED_GROUPS)
        self.committing = 0
        """Accepted training groups that are on their way to the disk: neither leased any more nor in the buffer."""

    async def submit(self, arrival: Arrival) -> "asyncio.Future[Verdict | Gap]":
        """Waits for room in the queue. The future holds the verdict once the group is durable, or a StorageError."""
        return await self._enqueue(arrival)

    async def last_committed(self, sampler_id: str, spool_id: str) -> int:
        """The highest durable seq, after everything submitted until now; 0 for none."""
        await self.flush()
        return self._heads.get((sampler_id, spool_id), 0)

    async def flush(self) -> None:
        """Waits until everything submitted until now is committed, or has failed."""
        await (await self._enqueue(None))

    async def _enqueue(self, arrival: Arrival | None) -> "asyncio.Future[Verdict | Gap]":
        future: asyncio.Future[Verdict | Gap] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        await self._queue.put(_Entry(arrival=arrival, future=future))
        return future

    async def run(self) -> None:
        """For ever. *Consumes* submitted groups; *waits for* the disk; *produces* verdicts; *on cancel* those not yet
        committed are cancelled. Raises StorageError after a fault that this process cannot outlive."""
        batch: list[_Entry] = []
        try:
            while True:
                batch = await self._gather()
                await self._commit([entry for entry in batch if entry.arrival is not None])
                for entry in batch:
                    if entry.arrival is None and not entry.future.done():
                        entry.future.set_result(Gap(expected_seq=0))
        finally:
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            for entry in batch:
                entry.future.cancel()

    async def _gather(self) -> list[_Entry]:
        batch = [await self._queue.get()]
        while len(batch) < _GROUPS_PER_COMMIT and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        with suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_S):
                while len(batch) < _GROUPS_TO_COMMIT_AT_ONCE and batch[-1].arrival is not None:
                    batch.append(await self._queue.get())
        return batch

    async def _commit(self, entries: list[_Entry]) -> None:
        arrivals = [entry.arrival for entry in entries if entry.arrival is not None]
        if not arrivals:
            return
        draft = _Draft()
        try:
            known = await self._journal.find(
                [(a.sampler_id, a.spool_id, a.envelope.seq, a.envelope.group_id) for a in arrivals]
            )
            fresh = [a.envelope for a, (by_seq, by_id) in zip(arrivals, known, strict=True) if not (by_seq or by_id)]
            inspected = iter(await asyncio.to_thread(lambda: [inspect(envelope, self._form) for envelope in fresh]))
            outcomes = [
                self._decide(draft, arrival, by_seq, by_id, None if by_seq or by_id else next(inspected))
                for arrival, (by_seq, by_id) in zip(arrivals, known, strict=True)
            ]
            ids: list[int] = []
            if draft.groups or draft.repeats or draft.resent:
                ids = await self._journal.commit(draft.groups, draft.repeats, draft.resent)
                self._room.written("groups")
        except StorageError as error:
            self._undo(draft)
            if isinstance(error, DiskFullError):
                self._room.refused("groups", error)
            else:
                _log.error("commit_failed", error=error, groups=len(arrivals))
            for entry in entries:
                if not entry.future.done():
                    entry.future.set_exception(error)
            if self._journal.broken is not None:
                raise
            return
        self._finish(draft, ids)
        for entry, outcome in zip(entries, outcomes, strict=True):
            if not entry.future.done():
                entry.future.set_result(outcome)

    def _undo(self, draft: _Draft) -> None:
        for work, _ in draft.accepted.values():
            self._leases.take_back(work)
        self.committing = 0

    def _finish(self, draft: _Draft, ids: Sequence[int]) -> None:
        self._heads |= draft.heads
        self.committing = 0
        accepted = [
            Accepted(
                id=ids[index],
                sampler_id=draft.groups[index].sampler_id,
                work=work,
                group=group,
                payload=draft.groups[index].payload,
            )
            for index, (work, group) in draft.accepted.items()
        ]
        if accepted:
            self._deliver(accepted)
        for lease_id, sampler_id in draft.refused:
            self._leases.refuse(lease_id, sampler_id)
        for row in draft.groups:
            if (sampler := self._sessions.find(row.sampler_id)) is not None:
                self._note(sampler, row)

    def _decide(
        self,
        draft: _Draft,
        arrival: Arrival,
        by_seq: First | None,
        by_id: First | None,
        inspected: Inspected | None,
    ) -> Verdict | Gap:
        stream, seq = (arrival.sampler_id, arrival.spool_id), arrival.envelope.seq
        expected = draft.heads.get(stream, self._heads.get(stream, 0)) + 1
        if seq > expected:
            return Gap(expected_seq=expected)
        if seq < expected:
            return self._again(draft, arrival, draft.by_seq.get((*stream, seq)) or by_seq)
        draft.heads[stream] = seq
        if (first := draft.by_id.get((arrival.sampler_id, arrival.envelope.group_id)) or by_id) is not None:
            return self._repeat(draft, arrival, first)
        if inspected is None:
            raise AssertionError("a group that nobody knows was not inspected")
        return self._admit(draft, arrival, inspected)

    def _again(self, draft: _Draft, arrival: Arrival, first: First | None) -> Verdict:
        """A seq that came before. With another group it is of a sampler that counts anew within an old spool: to call
        that a duplicate of what was accepted would lose all of its work without a word."""
        envelope = arrival.envelope
        if first is not None and _is_other(envelope, first.content_sha256):
            sampler = self._sessions.find(arrival.sampler_id)
            if sampler is not None and not sampler.quarantined:
                self._warn(arrival, Fault.ID_REUSE)
                _raise_streak(sampler, Fault.ID_REUSE)
            return Verdict(seq=envelope.seq, code=VerdictCode.INVALID, reason=Fault.ID_REUSE.value)
        draft.resent += 1
        code = first.verdict if first else None
        return Verdict(seq=envelope.seq, code=VerdictCode.DUPLICATE, reason=first.reason if first else "", first=code)

    def _repeat(self, draft: _Draft, arrival: Arrival, first: First) -> Verdict:
        """A group id that came before, under another seq."""
        same = first.content_sha256 == arrival.envelope.content_sha256
        code = VerdictCode.DUPLICATE if same else VerdictCode.INVALID
        reason = first.reason if same else Fault.ID_REUSE.value
        if not same:
            self._warn(arrival, reason)
        draft.repeats.append(
            RepeatRow(
                sampler_id=arrival.sampler_id,
                spool_id=arrival.spool_id,
                seq=arrival.envelope.seq,
                verdict=code,
                reason=reason,
                first=first.verdict,
                fresh=not same,
            )
        )
        self._remember(
            draft, arrival, First(verdict=first.verdict if same else code, reason=reason, content_sha256=b"")
        )
        return Verdict(seq=arrival.envelope.seq, code=code, reason=reason, first=first.verdict if same else None)

    def _admit(self, draft: _Draft, arrival: Arrival, inspected: Inspected) -> Verdict:
        judgement = self._judge(arrival, inspected)
        group = inspected.group
        row = self._row(arrival, group, judgement)
        draft.groups.append(row)
        if group is not None and judgement.code is VerdictCode.ACCEPTED:
            draft.accepted[len(draft.groups) - 1] = (self._leases.answer(group.lease_id, arrival.sampler_id), group)
            self.committing += group.purpose is LeasePurpose.TRAIN
        elif group is not None:
            draft.refused.append((group.lease_id, arrival.sampler_id))
        if judgement.code is VerdictCode.INVALID:
            self._warn(arrival, judgement.reason)
        first = First(verdict=judgement.code, reason=judgement.reason, content_sha256=row.content_sha256)
        self._remember(draft, arrival, first)
        draft.by_id[arrival.sampler_id, row.group_id] = first
        return Verdict(seq=arrival.envelope.seq, code=judgement.code, reason=judgement.reason)

    def _judge(self, arrival: Arrival, inspected: Inspected) -> Judgement:
        sampler = self._sessions.find(arrival.sampler_id)
        if sampler is not None and sampler.quarantined:
            return Judgement(code=VerdictCode.QUARANTINED)
        if inspected.group is None or inspected.fault is not None:
            return Judgement(code=VerdictCode.INVALID, reason=inspected.fault or Fault.DOES_NOT_PARSE)
        facts = self._leases.facts(inspected.group.lease_id, arrival.sampler_id)
        return judge(inspected.group, facts, self._versions, self._max_staleness)

    def _row(self, arrival: Arrival, group: ScoredGroup | None, judgement: Judgement) -> GroupRow:
        envelope = arrival.envelope
        lengths = [len(completion.token_ids) for completion in group.completions] if group else []
        name = LeaseName.parse(group.lease_id) if group else None
        bad_id = judgement.reason == Fault.BAD_GROUP_ID
        bad_digest = judgement.reason in (Fault.BAD_GROUP_ID, Fault.DIGEST_MISMATCH)
        return GroupRow(
            sampler_id=arrival.sampler_id,
            spool_id=arrival.spool_id,
            seq=envelope.seq,
            session_epoch=arrival.session_epoch,
            group_id=f"!{arrival.spool_id}:{envelope.seq}" if bad_id else envelope.group_id,
            content_sha256=hashlib.sha256(envelope.payload).digest() if bad_digest else envelope.content_sha256,
            verdict=judgement.code,
            reason=judgement.reason,
            purpose=PURPOSE_EVAL if group is not None and group.purpose is LeasePurpose.EVAL else PURPOSE_TRAIN,
            lease_id=group.lease_id[:64] if group else "",
            lease_number=name.number if name is not None and name.number is not None else -1,
            policy_version=group.policy_version if group else 0,
            tokens=sum(lengths),
            longest=max(lengths, default=0),
            arrived_unix_ms=self._unix_ms(),
            payload=envelope.payload if judgement.code is VerdictCode.ACCEPTED else b"",
        )

    def _remember(self, draft: _Draft, arrival: Arrival, first: First) -> None:
        draft.by_seq[arrival.sampler_id, arrival.spool_id, arrival.envelope.seq] = first

    def _warn(self, arrival: Arrival, reason: str) -> None:
        write = _log.error if reason in _ALARMING else _log.warning
        write("group_invalid", sampler_id=arrival.sampler_id, seq=arrival.envelope.seq, reason=reason)

    def _note(self, sampler: Sampler, row: GroupRow) -> None:
        if row.verdict is VerdictCode.ACCEPTED:
            sampler.groups_accepted += 1
            sampler.tokens_accepted += row.tokens
            sampler.invalid_streak = 0
        elif row.verdict is VerdictCode.INVALID:
            name = LeaseName.parse(row.lease_id)
            earlier = name is not None and name.learner_epoch != self._sessions.learner_epoch
            if not (earlier and row.reason in _AFTER_RESTART):  # else no sampler's fault
                _raise_streak(sampler, row.reason)


def _raise_streak(sampler: Sampler, reason: str) -> None:
    before = sampler.quarantined
    sampler.invalid_streak += 1
    sampler.invalid_for = reason
    if sampler.quarantined and not before:
        _log.error("sampler_quarantined", sampler_id=sampler.sampler_id, until="it registers again")


def _is_other(envelope: GroupEnvelope, content_sha256: bytes) -> bool:
    """Whether it is not what the journal knows by its seq, if that is known."""
    if not content_sha256 or envelope.content_sha256 == content_sha256:
        return False
    return hashlib.sha256(envelope.payload).digest() != content_sha256

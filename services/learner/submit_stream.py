"""One submission stream after its Welcome: reads groups ahead of the disk, within the credit, and writes what became of
them, in order.

    requests ─► _read ─► intake ─► futures in order of arrival ─► converse ─► Ack, Rewind, GoAway
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress

from heterorl.v1 import rollouts_pb2
from services.learner.data_plane import DataPlane
from services.learner.intake import Arrival, Gap
from services.runtime.errors import BadInputError, UnavailableError
from services.wire.convert import from_envelope, to_verdict
from services.wire.types import Session, Verdict

CREDIT_BYTES = 8 << 20
"""Payload bytes that a sampler may have unacknowledged: what 1 Gbit/s carries in 67 ms; commits take less."""

_MOST_SEQ = 1 << 62
_MOST_PENDING = 1024


class SubmitStream:
    def __init__(self, *, plane: DataPlane, session: Session, spool_id: str, credit_bytes: int) -> None:
        self._plane = plane
        self._session = session
        self._spool_id = spool_id
        self._credit_bytes = credit_bytes
        self._pending: deque[tuple[asyncio.Future[Verdict | Gap], int]] = deque()
        self._unacknowledged_bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._rewound_to = 0
        self._ending = ""
        self.groups = 0
        """Groups read from this stream."""

    def end(self, reason: str) -> None:
        """Reads no more, acknowledges what was read, then says GoAway with the reason."""
        self._ending = self._ending or reason
        self._news.set()

    async def converse(
        self, requests: AsyncIterator[rollouts_pb2.SubmitGroupsRequest], drain: asyncio.Event
    ) -> AsyncIterator[rollouts_pb2.SubmitGroupsResponse]:
        """Until the client is done, or `end` or `drain`. Raises FencedError and the like from the session's check,
        BadInputError for messages that do not belong here, StorageError when the journal fails."""
        reader = asyncio.create_task(self._read(requests))
        drained = asyncio.create_task(self._end_on(drain))
        reader.add_done_callback(lambda _: self._news.set())
        try:
            while True:
                self._news.clear()
                for message in self._collect():
                    yield message
                if self._ending:
                    reader.cancel()
                if reader.done() and not reader.cancelled():
                    reader.result()
                if reader.done() and not self._pending:
                    break
                await self._news.wait()
            if self._ending:
                yield rollouts_pb2.SubmitGroupsResponse(go_away=rollouts_pb2.SubmitGoAway(reason=self._ending))
        finally:
            for task in (reader, drained):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([task])

    async def _end_on(self, drain: asyncio.Event) -> None:
        await drain.wait()
        self.end("the learner is going away")

    async def _read(self, requests: AsyncIterator[rollouts_pb2.SubmitGroupsRequest]) -> None:
        async for request in requests:
            if request.WhichOneof("message") != "group":
                raise BadInputError("after Hello a stream carries groups only")
            envelope = from_envelope(request.group)
            if not 1 <= envelope.seq <= _MOST_SEQ:
                raise BadInputError("seq counts from 1, without gaps")
            self._plane.sessions.check(self._session)
            size = len(envelope.payload)
            await self._wait_for_credit(size)
            arrival = Arrival(
                sampler_id=self._session.sampler_id,
                session_epoch=self._session.session_epoch,
                spool_id=self._spool_id,
                envelope=envelope,
            )
            future = await self._plane.intake.submit(arrival)
            future.add_done_callback(lambda _: self._news.set())
            self._pending.append((future, size))
            self._unacknowledged_bytes += size
            self.groups += 1

    async def _wait_for_credit(self, size: int) -> None:
        """Flow control for whoever ignores its credit, or reads no Acks of empty groups; a group larger than all credit
        passes alone."""
        while len(self._pending) >= _MOST_PENDING or (
            self._unacknowledged_bytes and self._unacknowledged_bytes + size > self._credit_bytes
        ):
            self._room.clear()
            await self._room.wait()

    def _collect(self) -> list[rollouts_pb2.SubmitGroupsResponse]:
        """One Ack for all verdicts that are due, and a Rewind where a gap was seen."""
        verdicts: list[Verdict] = []
        rewind = 0
        while self._pending and self._pending[0][0].done():
            future, size = self._pending.popleft()
            self._unacknowledged_bytes -= size
            if future.cancelled():
                raise UnavailableError("the learner is stopping: send again when it is back")
            outcome = future.result()
            if isinstance(outcome, Verdict):
                verdicts.append(outcome)
                self._rewound_to = 0
            elif outcome.expected_seq != self._rewound_to:
                rewind = self._rewound_to = outcome.expected_seq
        self._room.set()
        messages: list[rollouts_pb2.SubmitGroupsResponse] = []
        if verdicts:
            messages.append(rollouts_pb2.SubmitGroupsResponse(ack=self._ack(verdicts)))
        if rewind:
            messages.append(rollouts_pb2.SubmitGroupsResponse(rewind=rollouts_pb2.SubmitRewind(expected_seq=rewind)))
        return messages

    def _ack(self, verdicts: list[Verdict]) -> rollouts_pb2.SubmitAck:
        """Duplicates below it do not lower what is durable: a sampler forgets everything up to the highest."""
        return rollouts_pb2.SubmitAck(
            through_seq=max(verdict.seq for verdict in verdicts),
            verdicts=map(to_verdict, verdicts),
            credit_bytes=self._credit_bytes,
            learner_version=max(0, self._plane.learner_version),
        )

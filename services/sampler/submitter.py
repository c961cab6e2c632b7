"""Sends the spool to the learner over one stream, and forgets only what the learner has acknowledged.

    Hello ─► Welcome{last committed, credit} ─► groups from last committed + 1 … ◄─ Ack{through, verdicts, credit}
    Rewind ─► send again from there · GoAway, or a cut ─► back off, begin again with Hello

Guarantee: a group leaves the spool only through an Ack or a Welcome that covers its seq.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import grpc

from heterorl.v1 import rollouts_pb2
from services.runtime.backoff import Backoff
from services.runtime.errors import (
    BadInputError,
    DiskFullError,
    ExhaustedError,
    HeteroRLError,
    ObjectGoneError,
    UnavailableError,
)
from services.runtime.log import get_logger
from services.sampler.session import LearnerSession
from services.sampler.spool import RETRY_S, Spool
from services.sampler.tally import Tally
from services.wire.convert import from_verdict, to_envelope, to_session
from services.wire.types import VerdictCode

if TYPE_CHECKING:  # generated stubs exist for type checkers only
    from heterorl.v1.rollouts_pb2_grpc import RolloutServiceAsyncStub

_log = get_logger("sampler.submitter")
_READ_BYTES = 1 << 20
_WELCOME_TIMEOUT_S = 20.0
_RETRIED = (UnavailableError, ExhaustedError, BadInputError, ObjectGoneError, DiskFullError)
_GOOD = (VerdictCode.ACCEPTED, VerdictCode.DUPLICATE)


class SubmitStream(Protocol):
    """The part of grpc.aio.StreamStreamCall that is used."""

    async def read(self) -> rollouts_pb2.SubmitGroupsResponse | object: ...

    async def write(self, request: rollouts_pb2.SubmitGroupsRequest) -> None: ...

    async def done_writing(self) -> None: ...

    def cancel(self) -> bool: ...


class Submitter:
    """`acknowledged` is called with the highest seq that is done with: durable at the learner, or numbered anew."""

    def __init__(
        self,
        *,
        spool: Spool,
        rollouts: "RolloutServiceAsyncStub",
        session: LearnerSession,
        tally: Tally,
        acknowledged: Callable[[int], None],
        backoff: Backoff | None = None,
    ) -> None:
        self._spool = spool
        self._rollouts = rollouts
        self._session = session
        self._tally = tally
        self._acknowledged = acknowledged
        self._backoff = backoff or Backoff()
        self._next_seq = 0
        self._sent_through = spool.next_seq - 1  # by an earlier process
        self._window = 0
        self._in_flight: deque[tuple[int, int]] = deque()
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """For ever. Waits for: groups, credit, a connection. On cancel: the stream is closed, the spool keeps all.

        Raises FencedError, RefusedError, ConfigError from the learner; StorageError from the spool.
        """
        while True:
            session = self._session.session
            try:
                await self._converse()
                error: HeteroRLError = UnavailableError("the learner closed the stream")
            except grpc.aio.AioRpcError as rpc_error:
                found = await self._session.after_failure(session, rpc_error)
                if not isinstance(found, _RETRIED):
                    raise found from None
                error = found
            except _RETRIED as found:
                error = found
            self._session.check_patience()
            wait_s = self._backoff.next_delay_s()
            _log.info("submit_stream_lost", error=error, retry_s=round(wait_s, 2), spool_groups=self._spool.groups)
            await asyncio.sleep(wait_s)

    async def _converse(self) -> None:
        """One stream, from Hello to its end."""
        call: SubmitStream = self._rollouts.SubmitGroups()
        try:
            await self._open(call)
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(self._send(call))
                await self._receive(call)
                sending.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            call.cancel()

    async def _open(self, call: SubmitStream) -> None:
        hello = rollouts_pb2.SubmitHello(
            session=to_session(self._session.session), spool_id=self._spool.spool_id, first_seq=self._spool.first_seq
        )
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                await _written(call, rollouts_pb2.SubmitGroupsRequest(hello=hello))
                message = await call.read()
        except TimeoutError:
            raise UnavailableError("the learner did not answer Hello") from None
        if not isinstance(message, rollouts_pb2.SubmitGroupsResponse):
            raise UnavailableError("the learner ended the stream before Welcome")
        if message.WhichOneof("message") == "go_away":
            raise UnavailableError(f"the learner is going away: {message.go_away.reason}")
        if message.WhichOneof("message") != "welcome":
            raise BadInputError("the learner's first message was not Welcome: update one end")
        committed = message.welcome.last_committed_seq
        if not self._follows(committed):
            await self._renumber(committed + 1)
        await self._forget_through(committed)
        self._next_seq = committed + 1
        self._in_flight.clear()
        self._window = message.welcome.credit_bytes
        self._session.learner_version = message.welcome.learner_version
        self._backoff.reset()

    async def _send(self, call: SubmitStream) -> None:
        while True:
            if self._spool.owes:
                await self._spool.forget_owed()
            self._spool.grew.clear()
            self._moved.clear()
            envelopes = await self._spool.read_from(self._next_seq, _READ_BYTES) if self._may_send(0) else []
            for envelope in envelopes:
                # A Rewind while this write was waiting makes the rest of what was read out of order.
                if envelope.seq != self._next_seq or not self._may_send(len(envelope.payload)):
                    break
                self._next_seq = envelope.seq + 1
                self._sent_through = max(self._sent_through, envelope.seq)
                self._in_flight.append((envelope.seq, len(envelope.payload)))
                if not await _written(call, rollouts_pb2.SubmitGroupsRequest(group=to_envelope(envelope))):
                    return
            else:
                if envelopes:
                    continue
            await self._something_new()

    def _may_send(self, payload_bytes: int) -> bool:
        """Within the credit; a group larger than all credit goes alone, or it would never go."""
        if not self._in_flight:
            return self._window > 0
        return sum(size for _, size in self._in_flight) + payload_bytes <= self._window

    async def _something_new(self) -> None:
        """Waits for a group in the spool, for news from the learner, or until a full disk is to be tried again."""
        timeout_s = RETRY_S if self._spool.owes else None
        waits = [asyncio.ensure_future(event.wait()) for event in (self._spool.grew, self._moved)]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _receive(self, call: SubmitStream) -> None:
        """Until the learner ends the stream."""
        while isinstance(message := await call.read(), rollouts_pb2.SubmitGroupsResponse):
            match message.WhichOneof("message"):
                case "ack":
                    await self._on_ack(message.ack)
                case "rewind":
                    await self._on_rewind(message.rewind.expected_seq)
                case "go_away":
                    _log.info("learner_going_away", reason=message.go_away.reason)
                    return
                case _:
                    raise BadInputError("the learner sent a message that this release does not know: update one end")
            self._moved.set()

    async def _on_ack(self, ack: rollouts_pb2.SubmitAck) -> None:
        if ack.through_seq > self._sent_through:
            raise BadInputError(
                f"the learner acknowledged group {ack.through_seq}, which was never sent: update one end"
            )
        for message in ack.verdicts:
            verdict = from_verdict(message)
            self._tally.verdicts[verdict.code.name.lower()] += 1
            if verdict.code not in _GOOD:
                _log.warning("group_not_taken", seq=verdict.seq, verdict=verdict.code.name, reason=verdict.reason)
        while self._in_flight and self._in_flight[0][0] <= ack.through_seq:
            self._in_flight.popleft()
        self._window = ack.credit_bytes
        self._session.learner_version = ack.learner_version
        await self._forget_through(ack.through_seq)

    async def _on_rewind(self, expected_seq: int) -> None:
        _log.warning("rewind", expected_seq=expected_seq, next_seq=self._next_seq)
        if not self._follows(expected_seq - 1):
            await self._renumber(expected_seq)
        self._in_flight.clear()
        self._next_seq = expected_seq

    def _follows(self, committed: int) -> bool:
        """Whether this spool goes on behind seq `committed`: with what it holds or, when empty, with its next group.
        A learner that has more than was ever sent knows a newer copy of this spool."""
        first = self._spool.first_seq or self._spool.next_seq
        return first - 1 <= committed <= self._sent_through

    async def _renumber(self, expected_seq: int) -> None:
        """One end was lost or restored from an older copy: what is left here goes as a new spool. Groups that the
        learner has after all are duplicates by their ids. Raises UnavailableError always: Hello names the spool."""
        last_seq = self._spool.next_seq - 1
        _log.error("ends_disagree", expected_seq=expected_seq, first_seq=self._spool.first_seq, last_seq=last_seq)
        await self._spool.renumber()
        self._sent_through = 0
        self._acknowledged(last_seq)  # the old numbers mean nothing now
        raise UnavailableError("the spool was renumbered: open a new stream")

    async def _forget_through(self, seq: int) -> None:
        await self._spool.delete_through(seq)
        self._acknowledged(seq)


async def _written(call: SubmitStream, request: rollouts_pb2.SubmitGroupsRequest) -> bool:
    """False on a stream that has ended: only a read tells why."""
    try:
        await call.write(request)
    except asyncio.InvalidStateError:
        return False
    return True


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of a stream's two halves: both see the same cut, and one of them knows more."""
    leaves = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in group.exceptions]
    for kind in (HeteroRLError, grpc.aio.AioRpcError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]

"""RolloutService: groups in, acknowledgements out.

    Hello ─► Welcome{last committed}     group ─► intake ─► Ack when durable     gap ─► Rewind
    drain, or a newer stream ─► GoAway

One stream per sampler: a newer one ends the older. A stream that dies loses nothing: the intake commits what it has.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc

from heterorl.v1 import rollouts_pb2, rollouts_pb2_grpc
from services.learner.control_service import check_session
from services.learner.data_plane import DataPlane
from services.learner.submit_stream import CREDIT_BYTES, SubmitStream
from services.runtime.errors import BadInputError, MismatchError
from services.runtime.log import get_logger
from services.wire.types import Session

_log = get_logger("learner.rollouts")

_Submit = grpc.aio.ServicerContext[rollouts_pb2.SubmitGroupsRequest, rollouts_pb2.SubmitGroupsResponse]


class RolloutService(rollouts_pb2_grpc.RolloutServiceServicer):
    """When `drain` is set, streams end with GoAway after what they have sent is acknowledged."""

    def __init__(
        self,
        plane: DataPlane,
        drain: asyncio.Event,
        hello_timeout_s: float = 10.0,
        credit_bytes: int = CREDIT_BYTES,
    ) -> None:
        self._plane = plane
        self._drain = drain
        self._hello_timeout_s = hello_timeout_s
        self._credit_bytes = credit_bytes
        self._streams: dict[str, SubmitStream] = {}

    async def SubmitGroups(
        self, request_iterator: AsyncIterator[rollouts_pb2.SubmitGroupsRequest], context: _Submit
    ) -> AsyncIterator[rollouts_pb2.SubmitGroupsResponse]:
        """*Consumes* groups, never more than the credit ahead of the disk; *waits for* the journal; *produces* Acks;
        *on cancel* nothing is lost: unacknowledged groups come again and are duplicates if they were committed."""
        requests = aiter(request_iterator)
        hello = await self._hello(requests, context)
        session, sampler = check_session(self._plane, context, hello.session)
        if not 0 < len(hello.spool_id) <= 64:
            raise BadInputError("a spool id has 1 to 64 characters")
        if sampler.foreign_spool == hello.spool_id:
            raise MismatchError("this spool was filled for another run: start a new one for this run")
        stream = SubmitStream(
            plane=self._plane, session=session, spool_id=hello.spool_id, credit_bytes=self._credit_bytes
        )
        if (older := self._streams.get(session.sampler_id)) is not None:
            older.end("a newer stream of this sampler was opened")
        self._streams[session.sampler_id] = stream
        try:
            yield await self._welcome(session, hello.spool_id)
            async for message in stream.converse(requests, self._drain):
                yield message
        finally:
            if self._streams.get(session.sampler_id) is stream:
                del self._streams[session.sampler_id]
            _log.info("submit_stream_ended", sampler_id=session.sampler_id, groups=stream.groups)

    async def _hello(
        self, requests: AsyncIterator[rollouts_pb2.SubmitGroupsRequest], context: _Submit
    ) -> rollouts_pb2.SubmitHello:
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                first = await anext(requests, None)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"no Hello within {self._hello_timeout_s:g} s: the stream is closed"
            )
        if first is None or first.WhichOneof("message") != "hello":
            raise BadInputError("a stream begins with Hello")
        return first.hello

    async def _welcome(self, session: Session, spool_id: str) -> rollouts_pb2.SubmitGroupsResponse:
        committed = await self._plane.intake.last_committed(session.sampler_id, spool_id)
        return rollouts_pb2.SubmitGroupsResponse(
            welcome=rollouts_pb2.SubmitWelcome(
                last_committed_seq=committed,
                credit_bytes=self._credit_bytes,
                learner_version=max(0, self._plane.learner_version),
            )
        )

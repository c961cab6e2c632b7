"""The reward service: the pool behind gRPC, on a Unix socket or a loopback port of the sampler's host.

serve:  pool ─► server ─► health SERVING ─► ... drain ... ─► NOT_SERVING ─► calls in flight end ─► pool closes
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from heterorl.v1 import reward_pb2, reward_pb2_grpc
from services.reward import messages
from services.reward.pool import Pool
from services.runtime.address import Address, parse_listen
from services.runtime.errors import BadInputError, ExhaustedError, HeteroRLError, UsageError
from services.runtime.lifecycle import Process
from services.runtime.log import get_logger
from services.wire.interceptors import ErrorInterceptor
from services.wire.server import bind, bind_unix, build_server

PENDING_COMPLETIONS_MAX = 8192
STREAM_GROUPS_MAX = 64
DRAIN_S = 30.0
RETRY_AFTER_S = 0.5

_log = get_logger("reward")


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Stateless but for the bound on what waits."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._pending = 0

    async def ScoreGroup(self, request: reward_pb2.ScoreGroupRequest, context: object) -> reward_pb2.ScoreGroupResponse:
        return await self._score(request)

    async def ScoreGroups(
        self, request_iterator: AsyncIterator[reward_pb2.ScoreGroupsRequest], context: object
    ) -> AsyncIterator[reward_pb2.ScoreGroupsResponse]:
        """Consumes requests, STREAM_GROUPS_MAX ahead of the answers taken; produces answers as they are ready."""
        answers: asyncio.Queue[reward_pb2.ScoreGroupsResponse | None] = asyncio.Queue()
        slots = asyncio.Semaphore(STREAM_GROUPS_MAX)  # groups whose answer is not yet taken: they bound the queue
        reading = asyncio.create_task(self._read(request_iterator, answers, slots))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                slots.release()
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterator[reward_pb2.ScoreGroupsRequest],
        answers: asyncio.Queue[reward_pb2.ScoreGroupsResponse | None],
        slots: asyncio.Semaphore,
    ) -> None:
        """Consumes one stream's requests, a slot for each; produces answers, then None. Cancelling ends its groups."""

        async def answer(request: reward_pb2.ScoreGroupsRequest) -> None:
            answers.put_nowait(await self._answer(request))

        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await slots.acquire()
                    tasks.create_task(answer(request))
        finally:
            answers.put_nowait(None)

    async def _answer(self, request: reward_pb2.ScoreGroupsRequest) -> reward_pb2.ScoreGroupsResponse:
        try:
            response = await self._score(request.request)
        except HeteroRLError as error:
            # One bad group never ends the stream.
            said = messages.text_on_wire(str(error))
            return reward_pb2.ScoreGroupsResponse(request_id=request.request_id, error=said)
        return reward_pb2.ScoreGroupsResponse(request_id=request.request_id, response=response)

    async def _score(self, request: reward_pb2.ScoreGroupRequest) -> reward_pb2.ScoreGroupResponse:
        count = len(request.completions)
        if count > PENDING_COMPLETIONS_MAX:
            raise BadInputError(f"A call scores at most {PENDING_COMPLETIONS_MAX} completions, not {count}.")
        if self._pending + count > PENDING_COMPLETIONS_MAX:
            raise ExhaustedError(f"{self._pending} completions wait to be graded; send later.", RETRY_AFTER_S)
        graders = messages.from_graders(request.graders)
        requests = messages.from_request(request)
        self._pending += count
        try:
            scores = await self._pool.score_group(requests, graders)
        finally:
            self._pending -= count
        return reward_pb2.ScoreGroupResponse(
            scores=[messages.to_score(score, graders) for score in scores],
            worker_restarts=self._pool.stats.restarts,
        )


async def serve(process: Process, listen: str, pool: Pool) -> None:
    """Serves until the process drains. `listen`: unix:///path, or HOST:PORT of a loopback address.

    Raises UsageError (no address), UnavailableError (in use), RefusedError (not loopback), EngineError (no workers).
    """
    place = _place(listen)
    async with pool:
        server = build_server("reward", [ErrorInterceptor()])
        # Made at import where grpc.aio is there, which its stubs do not know.
        servicer: _Health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardServicer(pool), server)
        bound = bind_unix(server, place) if isinstance(place, Path) else str(bind(server, place, None))
        await server.start()
        await _set_health(servicer, health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving", address=bound)
        process.ready(f"grading on {bound}")
        await process.drain.wait()
        await _set_health(servicer, health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.stop(DRAIN_S)
        _log.info("drained", scored=pool.stats.scored, restarts=pool.stats.restarts)
    if isinstance(place, Path):
        try:
            place.unlink(missing_ok=True)
        except OSError as error:  # a disk that became read-only: the next start removes it
            _log.warning("socket_not_removed", path=place, error=error)


class _Health(Protocol):
    async def set(self, service: str, status: int) -> None: ...


async def _set_health(servicer: _Health, status: int) -> None:
    for name in ("", "heterorl.v1.RewardService"):
        await servicer.set(name, status)


def _place(listen: str) -> Path | Address:
    if not listen.startswith("unix:"):
        return parse_listen(listen)
    path = listen.removeprefix("unix://") if listen.startswith("unix://") else listen.removeprefix("unix:")
    if not path:
        raise UsageError(f"{listen!r} names no socket: write unix:///path")
    return Path(path)

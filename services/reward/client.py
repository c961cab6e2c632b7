"""The sampler's end of the reward service; fills the seam Scorer, like the pool itself."""

import asyncio
import json
from collections.abc import Iterator, Sequence

import grpc

from heterorl.v1 import reward_pb2, reward_pb2_grpc
from services.reward import messages
from services.reward.scorer import Score, ScoreRequest
from services.reward.spec import GraderSpec
from services.runtime.address import parse_target
from services.runtime.errors import EngineError
from services.wire.channel import MESSAGE_BYTES, open_channel
from services.wire.errors import from_rpc_error

CALL_BYTES = MESSAGE_BYTES // 2
# More than the service grades of one completion, whatever characters it is made of: cutting here changes no score.
COMPLETION_BYTES = CALL_BYTES
_CHECK_S = 10.0


class RewardClient:
    """`target`: unix:///path, or HOST:PORT of a loopback address. Connects with the first call; close it at the end."""

    def __init__(self, target: str, *, timeout_s: float = 300.0) -> None:
        self._channel = open_channel(target if target.startswith("unix:") else parse_target(target), None, "control")
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        self._timeout_s = timeout_s

    async def score_group(self, requests: Sequence[ScoreRequest], graders: Sequence[GraderSpec]) -> list[Score]:
        """One score for each request, in order; the requests share prompt, answer and metadata.

        Raises ScoreError (bad grader or reference answer), UnavailableError (no service, or not within `timeout_s`),
        ExhaustedError (its queue is full), EngineError (it has no workers).
        """
        if not requests:
            return []
        calls = [self._call(message, graders, self._timeout_s) for message in _split(requests, graders)]
        return [score for scores in await asyncio.gather(*calls) for score in scores]

    async def check(self, graders: Sequence[GraderSpec]) -> None:
        """Asks whether the service knows and allows these graders: ScoreError where it does not. Raises what else
        `score_group` raises, within _CHECK_S."""
        nothing = reward_pb2.ScoreGroupRequest(graders=messages.to_graders(graders))
        await self._call(nothing, graders, min(_CHECK_S, self._timeout_s))

    async def close(self) -> None:
        """Ends calls in flight."""
        await self._channel.close()

    async def _call(
        self, message: reward_pb2.ScoreGroupRequest, graders: Sequence[GraderSpec], timeout_s: float
    ) -> list[Score]:
        try:
            response = await self._stub.ScoreGroup(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        if len(response.scores) != len(message.completions):
            raise EngineError(
                f"The reward service gave {len(response.scores)} scores for {len(message.completions)} completions."
            )
        return [messages.from_score(score, graders) for score in response.scores]


def _split(requests: Sequence[ScoreRequest], graders: Sequence[GraderSpec]) -> Iterator[reward_pb2.ScoreGroupRequest]:
    """As few messages as fit below the limit of one."""
    first = requests[0]
    specs = messages.to_graders(graders)
    metadata = json.dumps(dict(first.metadata))
    batch: list[str] = []
    size = 0
    for index, request in enumerate(requests):
        encoded = request.completion.encode(errors="replace")
        cut = encoded[:COMPLETION_BYTES]
        if batch and size + len(cut) > CALL_BYTES:
            yield _message(first, batch, specs, metadata)
            batch, size = [], 0
        batch.append(cut.decode(errors="ignore"))
        size += len(cut)
        if index == len(requests) - 1:
            yield _message(first, batch, specs, metadata)


def _message(
    first: ScoreRequest, completions: Sequence[str], specs: Sequence[messages.types_pb2.GraderSpec], metadata: str
) -> reward_pb2.ScoreGroupRequest:
    return reward_pb2.ScoreGroupRequest(
        prompt=messages.text_on_wire(first.prompt),
        answer=messages.text_on_wire(first.answer),
        completions=completions,
        graders=specs,
        metadata_json=metadata,
    )

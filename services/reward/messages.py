"""Scores and graders as messages of the reward service, for its two ends."""

import json
from collections.abc import Sequence
from typing import cast

from heterorl.v1 import reward_pb2, types_pb2
from services.reward.scorer import Part, Score, ScoreRequest, Status
from services.reward.spec import GraderSpec, parse_graders
from services.runtime.errors import ScoreError

STATUS = {
    Status.OK: reward_pb2.SCORE_STATUS_OK,
    Status.ANSWER_TIMEOUT: reward_pb2.SCORE_STATUS_ANSWER_TIMEOUT,
    Status.INFRASTRUCTURE_FAILURE: reward_pb2.SCORE_STATUS_INFRASTRUCTURE_FAILURE,
}
_STATUS_OF = {number: status for status, number in STATUS.items()}


def text_on_wire(text: str) -> str:
    """Lone surrogates have no UTF-8 form: each becomes a question mark."""
    return text.encode(errors="replace").decode()


def to_graders(specs: Sequence[GraderSpec]) -> list[types_pb2.GraderSpec]:
    return [
        types_pb2.GraderSpec(name=spec.name, weight=spec.weight, options_json=json.dumps(dict(spec.options)))
        for spec in specs
    ]


def from_graders(messages: Sequence[types_pb2.GraderSpec]) -> tuple[GraderSpec, ...]:
    """Raises ScoreError."""
    return parse_graders(
        [
            {
                "name": message.name,
                "weight": message.weight,
                "options": _object(message.options_json, f"options of grader {message.name!r:.60}"),
            }
            for message in messages
        ]
    )


def from_request(message: reward_pb2.ScoreGroupRequest) -> list[ScoreRequest]:
    """Raises ScoreError."""
    metadata = _object(message.metadata_json, "metadata")
    return [
        ScoreRequest(prompt=message.prompt, answer=message.answer, completion=completion, metadata=metadata)
        for completion in message.completions
    ]


def to_score(score: Score, graders: Sequence[GraderSpec]) -> reward_pb2.CompletionScore:
    return reward_pb2.CompletionScore(
        reward=score.reward,
        extracted=text_on_wire(score.extracted or ""),
        reason=text_on_wire(score.reason),
        seconds=score.seconds,
        status=STATUS[score.status],
        grader_scores=dict(zip(_names(graders), (part.reward for part in score.parts), strict=False)),
    )


def from_score(message: reward_pb2.CompletionScore, graders: Sequence[GraderSpec]) -> Score:
    """An unknown status is a failure of the grader: such a score is never trained on."""
    parts = tuple(
        Part(
            grader=name,
            reward=message.grader_scores[name],
            weight=spec.weight,
            extracted=None,
            reason=message.reason,
        )
        for name, spec in zip(_names(graders), graders, strict=True)
        if name in message.grader_scores
    )
    return Score(
        reward=message.reward,
        extracted=message.extracted or None,
        reason=message.reason,
        seconds=message.seconds,
        status=_STATUS_OF.get(message.status, Status.INFRASTRUCTURE_FAILURE),
        parts=parts,
    )


def _names(graders: Sequence[GraderSpec]) -> list[str]:
    """math, format, math#2: the second of a name needs one of its own."""
    names: list[str] = []
    for spec in graders:
        earlier = sum(name.partition("#")[0] == spec.name for name in names)
        names.append(spec.name if not earlier else f"{spec.name}#{earlier + 1}")
    return names


def _object(text: str, what: str) -> dict[str, object]:
    try:
        value: object = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"The {what} are not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ScoreError(f"The {what} must be a JSON object.")
    return cast("dict[str, object]", value)

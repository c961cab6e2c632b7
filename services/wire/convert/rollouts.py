"""Groups and verdicts."""

from heterorl.v1 import rollouts_pb2, types_pb2
from services.runtime.errors import BadInputError
from services.wire import types as t
from services.wire.convert.shared import enum_of, parse

_MOST_COMPLETIONS = 1 << 16
"""A message of 4 MiB can hold two million empty ones, which would take a gigabyte as objects."""


def encode_group(group: t.ScoredGroup) -> bytes:
    """The payload of an envelope: made once, by the sampler."""
    return rollouts_pb2.ScoredGroup(
        lease_id=group.lease_id,
        prompt_id=group.prompt_id,
        purpose=types_pb2.LeasePurpose.ValueType(group.purpose.value),
        policy_version=group.policy_version,
        policy_root=group.policy_root,
        prompt_token_ids=group.prompt_token_ids,
        completions=[
            rollouts_pb2.Completion(
                token_ids=completion.token_ids,
                sampler_logprobs=completion.sampler_logprobs,
                reward=completion.reward,
                finish_reason=rollouts_pb2.FinishReason.ValueType(completion.finish_reason.value),
                version_spans=[
                    rollouts_pb2.VersionSpan(end=span.end, policy_version=span.policy_version)
                    for span in completion.version_spans
                ],
                grader_scores=completion.grader_scores,
            )
            for completion in group.completions
        ],
        generation_s=group.generation_s,
        scoring_s=group.scoring_s,
        eval_round=group.eval_round,
        temperature=group.temperature,
        seed=group.seed,
    ).SerializeToString()


def decode_group(payload: bytes) -> t.ScoredGroup:
    message = parse(rollouts_pb2.ScoredGroup(), payload, "scored group")
    if len(message.completions) > _MOST_COMPLETIONS:
        raise BadInputError(f"a group of {len(message.completions)} completions is none")
    return t.ScoredGroup(
        lease_id=message.lease_id,
        prompt_id=message.prompt_id,
        purpose=enum_of(t.LeasePurpose, message.purpose),
        policy_version=message.policy_version,
        policy_root=message.policy_root,
        prompt_token_ids=tuple(message.prompt_token_ids),
        completions=tuple(
            t.Completion(
                token_ids=tuple(completion.token_ids),
                sampler_logprobs=tuple(completion.sampler_logprobs),
                reward=completion.reward,
                finish_reason=enum_of(t.FinishReason, completion.finish_reason),
                version_spans=tuple(
                    t.VersionSpan(end=span.end, policy_version=span.policy_version) for span in completion.version_spans
                ),
                grader_scores=dict(completion.grader_scores),
            )
            for completion in message.completions
        ),
        generation_s=message.generation_s,
        scoring_s=message.scoring_s,
        eval_round=message.eval_round,
        temperature=message.temperature,
        seed=message.seed,
    )


def to_envelope(envelope: t.GroupEnvelope) -> rollouts_pb2.GroupEnvelope:
    return rollouts_pb2.GroupEnvelope(
        seq=envelope.seq,
        group_id=envelope.group_id,
        content_sha256=envelope.content_sha256,
        payload=envelope.payload,
    )


def from_envelope(message: rollouts_pb2.GroupEnvelope) -> t.GroupEnvelope:
    """Does not look into the payload: a bad one earns a verdict, not an error."""
    return t.GroupEnvelope(
        seq=message.seq,
        group_id=message.group_id,
        content_sha256=message.content_sha256,
        payload=message.payload,
    )


def to_verdict(verdict: t.Verdict) -> rollouts_pb2.Verdict:
    return rollouts_pb2.Verdict(
        seq=verdict.seq,
        code=rollouts_pb2.VerdictCode.ValueType(verdict.code.value),
        reason=verdict.reason,
        first=rollouts_pb2.VerdictCode.ValueType(verdict.first.value if verdict.first else 0),
    )


def from_verdict(message: rollouts_pb2.Verdict) -> t.Verdict:
    return t.Verdict(
        seq=message.seq,
        code=enum_of(t.VerdictCode, message.code),
        reason=message.reason,
        first=enum_of(t.VerdictCode, message.first) if message.first else None,
    )

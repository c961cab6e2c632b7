"""What becomes of a group on arrival: pure functions from an envelope and what is known to a verdict.

    inspect: bytes ──► group, and the rule of form that it breaks, if any
    judge:   group + lease + versions ──► ACCEPTED, STALE, FUTURE_VERSION, LEASE_LOST, INVALID

STALE here only saves the buffer's space. The guarantee about staleness is `buffer.GroupBuffer.take`.
"""

import hashlib
import math
from dataclasses import dataclass
from enum import Enum, StrEnum

from services.learner.published import Origin, PublishedVersions
from services.runtime.errors import BadInputError
from services.wire.convert import decode_group
from services.wire.types import (
    MOST_REWARD,
    Completion,
    GroupEnvelope,
    LeasePurpose,
    Prompt,
    ScoredGroup,
    VerdictCode,
)


class Fault(StrEnum):
    """Reasons of an INVALID verdict: the closed list that operators and tests see."""

    BAD_GROUP_ID = "BAD_GROUP_ID"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    DOES_NOT_PARSE = "DOES_NOT_PARSE"
    ID_REUSE = "ID_REUSE"
    NO_COMPLETIONS = "NO_COMPLETIONS"
    EMPTY_COMPLETION = "EMPTY_COMPLETION"
    EMPTY_PROMPT = "EMPTY_PROMPT"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    COMPLETION_TOO_LONG = "COMPLETION_TOO_LONG"
    TOKEN_OUT_OF_VOCABULARY = "TOKEN_OUT_OF_VOCABULARY"
    LENGTH_MISMATCH = "LENGTH_MISMATCH"
    """Token ids and log-probs differ in number."""
    LOGPROB_NOT_FINITE = "LOGPROB_NOT_FINITE"
    LOGPROB_POSITIVE = "LOGPROB_POSITIVE"
    REWARD_NOT_FINITE = "REWARD_NOT_FINITE"
    REWARD_TOO_LARGE = "REWARD_TOO_LARGE"
    BAD_VERSION_SPANS = "BAD_VERSION_SPANS"
    WRONG_GROUP_SIZE = "WRONG_GROUP_SIZE"
    WRONG_TEMPERATURE = "WRONG_TEMPERATURE"
    NEVER_LEASED = "NEVER_LEASED"
    OTHER_PROMPT = "OTHER_PROMPT"
    OTHER_PURPOSE = "OTHER_PURPOSE"
    """Purpose or evaluation round are not the lease's."""
    VERSION_TOO_OLD_FOR_LEASE = "VERSION_TOO_OLD_FOR_LEASE"
    """An evaluation by an older version than the round's."""
    UNKNOWN_ROOT = "UNKNOWN_ROOT"


ROLLED_BACK = "ROLLED_BACK"
"""Reason of FUTURE_VERSION for weights that a restore of the learner undid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormRules:
    """Bounds that hold for every group of the run."""

    vocab_size: int
    max_prompt_tokens: int
    max_completion_tokens: int
    max_eval_tokens: int
    temperature: float
    eval_temperature: float


class Standing(Enum):
    """What the lease that a group names is now."""

    OPEN = 1
    OVER = 2
    """Answered, given up, or of an evaluation that ended."""
    NEVER = 3
    """Never granted, or granted to another sampler only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseFacts:
    """What admission needs to know of a lease; the fields below `standing` mean something only when it is OPEN."""

    standing: Standing
    prompt: Prompt | None = None
    purpose: LeasePurpose = LeasePurpose.TRAIN
    eval_round: int = 0
    group_size: int = 0
    min_policy_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    code: VerdictCode
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """A sound group has no fault; a faulty one is kept where it parses, because it names its lease."""

    group: ScoredGroup | None = None
    fault: Fault | None = None


_ACCEPTED = Judgement(code=VerdictCode.ACCEPTED)
_LEASE_LOST = Judgement(code=VerdictCode.LEASE_LOST)
_STALE = Judgement(code=VerdictCode.STALE)


def inspect(envelope: GroupEnvelope, rules: FormRules) -> Inspected:
    """Checks form and values. Touches no state, so that it can run in a thread."""
    if not _is_group_id(envelope.group_id):
        return Inspected(fault=Fault.BAD_GROUP_ID)
    if hashlib.sha256(envelope.payload).digest() != envelope.content_sha256:
        return Inspected(fault=Fault.DIGEST_MISMATCH)
    try:
        group = decode_group(envelope.payload)
    except BadInputError:
        return Inspected(fault=Fault.DOES_NOT_PARSE)
    return Inspected(group=group, fault=fault_of(group, rules))


def _is_group_id(text: str) -> bool:
    """The journal writes "!" before what stands for an id that is none."""
    return 0 < len(text) <= 64 and text.isascii() and text.isprintable() and not text.startswith("!")


def fault_of(group: ScoredGroup, rules: FormRules) -> Fault | None:
    """The rule of form that the group breaks, if any."""
    evaluation = group.purpose is LeasePurpose.EVAL
    if not group.completions:
        return Fault.NO_COMPLETIONS
    if not group.prompt_token_ids:
        return Fault.EMPTY_PROMPT
    if len(group.prompt_token_ids) > rules.max_prompt_tokens:
        return Fault.PROMPT_TOO_LONG
    if max(group.prompt_token_ids) >= rules.vocab_size:
        return Fault.TOKEN_OUT_OF_VOCABULARY
    if not math.isclose(group.temperature, rules.eval_temperature if evaluation else rules.temperature, rel_tol=1e-6):
        return Fault.WRONG_TEMPERATURE
    longest = rules.max_eval_tokens if evaluation else rules.max_completion_tokens
    for completion in group.completions:
        if fault := _inspect_completion(completion, group.policy_version, longest, rules.vocab_size):
            return fault
    return None


def _inspect_completion(completion: Completion, policy_version: int, longest: int, vocab_size: int) -> Fault | None:
    ids, logprobs = completion.token_ids, completion.sampler_logprobs
    if not ids:
        return Fault.EMPTY_COMPLETION
    if len(ids) > longest:
        return Fault.COMPLETION_TOO_LONG
    if len(ids) != len(logprobs):
        return Fault.LENGTH_MISMATCH
    if max(ids) >= vocab_size:
        return Fault.TOKEN_OUT_OF_VOCABULARY
    if not all(map(math.isfinite, logprobs)):
        return Fault.LOGPROB_NOT_FINITE
    if max(logprobs) > 0:
        return Fault.LOGPROB_POSITIVE
    rewards = (completion.reward, *completion.grader_scores.values())
    if not all(map(math.isfinite, rewards)):
        return Fault.REWARD_NOT_FINITE
    if max(map(abs, rewards)) > MOST_REWARD:
        return Fault.REWARD_TOO_LARGE
    return None if _spans_are_sound(completion, policy_version) else Fault.BAD_VERSION_SPANS


def _spans_are_sound(completion: Completion, policy_version: int) -> bool:
    """Spans tile the tokens, versions never fall, and none is older than the group's."""
    end, version = 0, policy_version
    for span in completion.version_spans:
        if span.end <= end or span.policy_version < version:
            return False
        end, version = span.end, span.policy_version
    return not completion.version_spans or end == len(completion.token_ids)


def judge(group: ScoredGroup, lease: LeaseFacts, versions: PublishedVersions, max_staleness: int) -> Judgement:
    """The verdict on a group whose form is sound. Its version is checked first: lies about weights must show."""
    if refusal := _judge_version(group, versions):
        return refusal
    match lease.standing:
        case Standing.NEVER:
            return _invalid(Fault.NEVER_LEASED)
        case Standing.OVER:
            return _LEASE_LOST
        case Standing.OPEN:
            pass
    if lease.prompt is None or group.prompt_id != lease.prompt.prompt_id:
        return _invalid(Fault.OTHER_PROMPT)
    if group.purpose is not lease.purpose or group.eval_round != lease.eval_round:
        return _invalid(Fault.OTHER_PURPOSE)
    if len(group.completions) != lease.group_size:
        return _invalid(Fault.WRONG_GROUP_SIZE)
    if group.purpose is LeasePurpose.EVAL:
        old = group.policy_version < lease.min_policy_version
        return _invalid(Fault.VERSION_TOO_OLD_FOR_LEASE) if old else _ACCEPTED
    return _STALE if versions.current - group.policy_version > max_staleness else _ACCEPTED


def _judge_version(group: ScoredGroup, versions: PublishedVersions) -> Judgement | None:
    newest = max(
        (span.policy_version for completion in group.completions for span in completion.version_spans),
        default=group.policy_version,
    )
    match versions.origin(group.policy_version, group.policy_root):
        case Origin.UNKNOWN_ROOT:
            return _invalid(Fault.UNKNOWN_ROOT)
        case Origin.ROLLED_BACK:
            return Judgement(code=VerdictCode.FUTURE_VERSION, reason=ROLLED_BACK)
        case Origin.FUTURE:
            return Judgement(code=VerdictCode.FUTURE_VERSION)
        case Origin.FORGOTTEN:
            return _STALE
        case Origin.PUBLISHED:
            return Judgement(code=VerdictCode.FUTURE_VERSION) if newest > versions.current else None


def _invalid(fault: Fault) -> Judgement:
    return Judgement(code=VerdictCode.INVALID, reason=fault.value)

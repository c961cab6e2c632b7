"""The protocol's data as plain frozen dataclasses. Generated classes stop at `convert` and the endpoints.

Field meanings, units and bounds are written once, in proto/heterorl/v1; here stand only the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

PROTOCOL_VERSION = 1
ROOT_IN_LAST_PART = "root_in_last_part"
"""Ability to read updates of which only the last part names the target root."""
FEATURES = frozenset({ROOT_IN_LAST_PART})
"""What a sampler of this build says at registration that it can."""
MOST_REWARD = 1e12
"""Either way. Gradients are float32, and the square of their norm too: far larger rewards make steps that are not
finite, and enough of those end the run."""


class LeasePurpose(Enum):
    TRAIN = 1
    EVAL = 2


class FinishReason(Enum):
    STOP = 1
    LENGTH = 2


class SamplerState(Enum):
    STARTING = 1
    GENERATING = 2
    WAITING_FOR_LEASES = 3
    SWAPPING = 4
    SPOOL_FULL = 5
    DRAINING = 6
    PAUSED = 7
    LOST = 8


class Directive(Enum):
    CONTINUE = 1
    PAUSE = 2
    DRAIN = 3


class VerdictCode(Enum):
    ACCEPTED = 1
    DUPLICATE = 2
    STALE = 3
    FUTURE_VERSION = 4
    INVALID = 5
    LEASE_LOST = 6
    QUARANTINED = 7


class UpdateKind(Enum):
    KEYFRAME = 1
    DELTA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    run_id: str
    sampler_id: str
    learner_epoch: int
    session_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRef:
    object_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    name: str
    object: ObjectRef


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    temperature: float
    max_completion_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GraderSpec:
    name: str
    weight: float = 1.0
    options_json: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    model_files: tuple[ModelFile, ...]
    model_files_sha256: str
    vocab_size: int
    weights_dtype: str
    group_size: int
    max_staleness: int
    max_prompt_tokens: int
    sampling: SamplingSettings
    eval_sampling: SamplingSettings
    graders: tuple[GraderSpec, ...]
    system_prompt: str = ""
    manifest_public_key: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    kind: str
    version: str
    device: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    prompt_id: str
    text: str
    answer: str
    metadata_json: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    lease_id: str
    ttl_ms: int
    prompt: Prompt
    group_size: int
    purpose: LeasePurpose
    min_policy_version: int
    seed: int
    eval_round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    end: int
    policy_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """`token_ids` and `sampler_logprobs` have the same length; the end-of-sequence token is one of them."""

    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    reward: float
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...] = ()
    grader_scores: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    lease_id: str
    prompt_id: str
    purpose: LeasePurpose
    policy_version: int
    policy_root: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    generation_s: float
    scoring_s: float
    temperature: float
    seed: int
    eval_round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEnvelope:
    """A group as spool, wire and journal hold it: `payload` is never re-serialised, so its digest stays."""

    seq: int
    group_id: str
    content_sha256: bytes
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    seq: int
    code: VerdictCode
    reason: str = ""
    first: VerdictCode | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    run_id: str
    learner_epoch: int
    version: int
    root: str
    parent_root: str
    full_bytes: int
    parameters: int
    changed: int
    model_files_sha256: str
    published_unix_ms: int
    update_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedManifest:
    """`manifest` are the exact bytes that `signature` (Ed25519) covers; `decoded` is what they say."""

    manifest: bytes
    signature: bytes
    decoded: Manifest


TABLES_BYTES = 64 << 20
"""Beside whole weights, an update has at most so much: tables and headers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStep:
    kind: UpdateKind
    base_root: str
    target_root: str
    target_version: int
    objects: tuple[ObjectRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coming:
    """Objects, from number `first` on, of an update that is being made: the next version's, not signed yet."""

    base_root: str
    target_root: str
    target_version: int
    first: int
    objects: tuple[ObjectRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A version; `update` is the one that was made for it, or None where a plan has to be asked for. `coming`: what is
    new of the one that is being made for the next."""

    manifest: SignedManifest
    update: PlanStep | None
    coming: Coming | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    target: SignedManifest
    steps: tuple[PlanStep, ...]

    @property
    def total_bytes(self) -> int:
        return sum(ref.size_bytes for step in self.steps for ref in step.objects)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchProgress:
    target_version: int
    bytes_done: int
    bytes_total: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerReport:
    """What a heartbeat says, besides the session."""

    state: SamplerState
    policy_version: int
    policy_root: str
    lease_ids: tuple[str, ...] = ()
    spool_groups: int = 0
    spool_bytes: int = 0
    groups_total: int = 0
    tokens_total: int = 0
    weights_bytes_received: int = 0
    tokens_per_s: float = 0.0
    fetch: FetchProgress | None = None
    last_swap_pause_ms: float = 0.0
    engine_restarts: int = 0
    grader_restarts: int = 0
    groups_dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    engine: EngineInfo | None = None

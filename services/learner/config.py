"""The learner's configuration: `run.toml`. Every key's docstring is its documentation, units included."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, JsonValue, model_validator

from services.learner.losses.settings import LossSettings
from services.runtime.address import ListenKey, OptionalListenKey
from services.runtime.config import Section
from services.runtime.log import LogSection
from services.wire.tls import TlsFiles

_MOST = 1_000_000_000
"""Of what is counted in messages, in 32 bits."""
_LONGEST_S = 1_000_000
"""Of times that are milliseconds in messages, in 32 bits."""


class RunSection(Section):
    """What the run is called, where it lives, how long it goes."""

    id: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run: letters, digits, dot, dash, underscore."""
    state_dir: Path = Path("runs/run")
    """Folder of the learner's state: journal, objects, checkpoints, metrics.jsonl. Locked by one learner at a time."""
    steps: int = Field(default=1000, ge=0)
    """Optimizer steps that end the run; 0 runs until it is stopped."""
    seed: int = 0
    """Seed of prompt order and of what samplers draw; training itself draws nothing."""
    resume: bool = True
    """Go on from the newest checkpoint in state_dir; false refuses to start on a folder that holds one."""
    export_dir: Path | None = None
    """Where the final policy is written in Hugging Face format; unset writes it to state_dir/policy. An earlier export
    there is replaced, anything else refused."""

    @property
    def policy_dir(self) -> Path:
        """`export_dir` or its default."""
        return self.export_dir or self.state_dir / "policy"


class ListenSection(Section):
    """The one port of the learner, and its metrics."""

    address: ListenKey = "0.0.0.0:7443"
    """HOST:PORT of the gRPC server; port 0 takes a free one (printed, and written to state_dir/address)."""
    insecure: bool = False
    """Serve without TLS: loopback addresses only."""
    metrics_address: OptionalListenKey = ""
    """HOST:PORT of the Prometheus endpoint; empty for none."""
    max_connections: int = Field(default=256, ge=1, le=100_000)
    """Most connections at once. A sampler opens 2, and without a relay one more for each of its connect.channels beyond
    1. One that stalls may take 1.2 MiB of memory."""


class PolicySection(Section):
    """The model that is trained."""

    path: Path = Path("model")
    """Hugging Face directory: config.json, tokenizer with chat template, safetensors."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward pass under autocast; master weights and log-probs are always float32."""
    gradient_checkpointing: bool = False
    """Trade time for memory in the backward pass."""


class DataSection(Section):
    """Prompts and reference answers."""

    train: Path = Path("train.jsonl")
    """JSONL file of training prompts."""
    prompt_key: str = ""
    """Key of the prompt in each line; empty detects "prompt", "question" (GSM8K) or "problem" (MATH)."""
    answer_key: str = ""
    """Key of the reference answer; empty detects "answer" or "solution" (MATH)."""
    eval: Path | None = None
    """JSONL file of held-out prompts; unset for no evaluation."""
    shuffle: bool = True
    """Shuffle the prompts in every epoch, by run.seed."""
    max_prompt_tokens: int = Field(default=768, ge=1, le=_MOST)
    """Longer prompts are dropped by the sampler and counted, as are those that fill the model's context."""
    system_prompt: str = ""
    """System message put before each prompt; empty for none."""


class SamplingSection(Section):
    """How samplers draw completions."""

    group_size: int = Field(default=8, ge=2, le=_MOST)
    """Completions per prompt, G."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, at the sampler and at the learner."""
    max_completion_tokens: int = Field(default=2048, ge=1, le=_MOST)
    """Longest completion, in tokens; one that reaches it is over-long."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus bound; below 1 only with engines that report log-probs of the truncated distribution."""
    top_k: int = Field(default=0, ge=0, le=_MOST)
    """Most likely tokens kept; 0 is off. Above 0 as for top_p."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a completion."""


class EvalSection(Section):
    """In-loop evaluation on held-out prompts, generated and scored by the samplers."""

    every_steps: int = Field(default=0, ge=0)
    """Optimizer steps between evaluations; 0 evaluates only at the start and the end."""
    at_start: bool = True
    """Evaluate version 0 before the first step: training waits for it."""
    at_end: bool = True
    """Evaluate the final version before the run ends."""
    prompts: int = Field(default=128, ge=1)
    """Prompts of data.eval used in each round (the first ones)."""
    samples: int = Field(default=1, ge=1, le=_MOST)
    """Completions per prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """Temperature of evaluation; 0 is greedy."""


class GraderSection(Section):
    """One grader of the reward."""

    name: str = "math"
    """Registered grader; docs/rewards.md lists them."""
    weight: float = 1.0
    """Factor of its score in the reward."""
    options: dict[str, JsonValue] = {}
    """The grader's own options."""


class StalenessSection(Section):
    """How old a group may be when it is trained."""

    max_staleness: int = Field(default=8, ge=0, le=1_000_000)
    """Most versions between a group's policy and the learner's when the group is trained; 0 is the online mode."""
    max_age_s: float = Field(default=0.0, ge=0)
    """Also drop groups that waited longer than this at the learner, in seconds; 0 is off."""


class BatchSection(Section):
    """What one optimizer step consumes."""

    groups_per_step: int = Field(default=32, ge=1, le=_MOST)
    """Groups (prompts) per optimizer step, P; the batch has P × G rows."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Most tokens, padding included, in one forward and backward pass; results do not depend on it."""
    recompute_logprobs: bool = False
    """Take log-probs of samples from the trainer, under the versions that drew them, instead of from the engines: for
    engines that round differently (bf16, quantised). Costs a second model on the device, max_staleness + 1 versions in
    host memory, and a forward pass. Not with sampling.top_p or top_k."""


_Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW on float32 master weights."""

    lr: float = Field(default=1e-6, gt=0)
    """Learning rate after warm-up."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's denominator guard."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up, then constant."""
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    """Gradient norm at which gradients are clipped; inf: never."""


class PublishSection(Section):
    """How versions are encoded and kept."""

    codec: Literal["sx", "xc"] = "sx"
    """Delta encoding; docs/weights.md compares them."""
    keep_versions: int = Field(default=64, ge=2)
    """Versions whose deltas stay on disk; older receivers get a keyframe."""
    workers: int = Field(default=2, ge=1)
    """Threads that encode."""
    diff_on_device: bool = True
    """Where the policy is on CUDA, compare versions there, so that only what changed crosses the bus; takes 2 bytes of
    the device's memory per parameter, 4 while a version is encoded."""
    max_mbit_s: float = Field(default=0.0, ge=0)
    """Rate limit of weight bytes for each sampler, in Mbit/s; 0 is off."""
    sign: bool = True
    """Sign manifests with an Ed25519 key kept in state_dir."""


class LeaseSection(Section):
    """Prompt leases and sessions."""

    ttl_s: float = Field(default=120.0, gt=0, le=_LONGEST_S)
    """Time-to-live of a lease without a heartbeat, in seconds."""
    heartbeat_s: float = Field(default=10.0, ge=0.5, le=_LONGEST_S)
    """Time between a sampler's heartbeats, in seconds."""
    session_ttl_s: float = Field(default=35.0, gt=0, le=_LONGEST_S)
    """A sampler that is silent for longer is lost, in seconds."""
    ahead: float = Field(default=0.5, ge=0, le=1000)
    """Pacing: groups out or waiting may reach (max_staleness × ahead + 1) × groups_per_step. The rest of the window is
    for links and swaps: at 1 the queue alone uses it up, and groups arrive stale."""

    @model_validator(mode="after")
    def _outlive_heartbeats(self) -> "LeaseSection":
        if min(self.ttl_s, self.session_ttl_s) <= 1.2 * self.heartbeat_s:  # one may come 20 % late
            raise ValueError(
                "ttl_s and session_ttl_s must be more than 1.2 × heartbeat_s, or samplers that are well count as lost"
            )
        return self


class CheckpointSection(Section):
    """Full state for restart."""

    every_steps: int = Field(default=50, ge=0)
    """Optimizer steps between checkpoints; 0 writes only the last."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""


class LearnerConfig(Section):
    """The tree of run.toml."""

    run: RunSection = RunSection()
    listen: ListenSection = ListenSection()
    tls: TlsFiles | None = None
    """Certificates; needed unless listen.insecure."""
    policy: PolicySection = PolicySection()
    data: DataSection = DataSection()
    sampling: SamplingSection = SamplingSection()
    eval: EvalSection = EvalSection()
    reward: list[GraderSection] = Field(default=[GraderSection()], min_length=1)
    """The reward is the weighted sum of these graders."""
    staleness: StalenessSection = StalenessSection()
    batch: BatchSection = BatchSection()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSection = OptimizerSection()
    publish: PublishSection = PublishSection()
    lease: LeaseSection = LeaseSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _rewards_are_shares(self) -> "LearnerConfig":
        weights = [grader.weight for grader in self.reward]
        if self.loss.wants_shares and (min(weights) < 0.0 or sum(weights) > 1.0 + 1e-6):
            raise ValueError(
                "the bnpo advantage needs rewards between 0 and 1: let the weights of [[reward]] be 0 or more, and "
                "their sum at most 1"
            )
        return self

    @model_validator(mode="after")
    def _recomputes_what_was_drawn_from(self) -> "LearnerConfig":
        if self.batch.recompute_logprobs and (self.sampling.top_p < 1.0 or self.sampling.top_k > 0):
            raise ValueError(
                "batch.recompute_logprobs knows nothing of sampling.top_p and top_k, and would take samples for draws "
                "from the whole distribution: set top_p to 1 and top_k to 0, or recompute_logprobs to false"
            )
        return self

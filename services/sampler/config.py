"""The sampler's configuration: two facts of its own (learner address, credentials) and local resources.

Model, tokenizer, sampling parameters, reward, group size and staleness come from the learner at registration.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from services.runtime.address import OptionalListenKey, OptionalLocalKey, OptionalTargetKey, TargetKey
from services.runtime.config import Section
from services.runtime.errors import ConfigError
from services.runtime.log import LogSection
from services.sampler.delays import DelaySection
from services.wire.tls import TlsFiles


class ConnectSection(Section):
    """Where the learner is and who this sampler is."""

    learner: TargetKey = "localhost:7443"
    """HOST:PORT of the learner, or of a relay's learner."""
    weights: OptionalTargetKey = ""
    """HOST:PORT of a relay for weights; empty fetches from the learner."""
    channels: int = Field(default=1, ge=1, le=16)
    """Connections that weights come by, each with a part of every object; more than 1 helps where one connection is
    held back by loss or by the kernel's socket buffers."""
    sampler_id: str = ""
    """Name of this sampler; empty takes the id in the certificate."""
    insecure: bool = False
    """Connect without TLS: loopback addresses only."""
    give_up_s: float = Field(default=0.0, ge=0)
    """End with exit code 69 when the learner stays away this long, in seconds; 0 waits for ever."""


class VllmSection(Section):
    """Settings of engine.kind = "vllm" only."""

    swap: Literal["between_groups", "in_flight"] = "between_groups"
    """When new weights come in: after the groups that run (each is of one version), or between two tokens."""
    max_model_len: int = Field(default=0, ge=0)
    """Longest sequence in tokens, prompt and completion; 0 takes the model's context."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for weights and key-value cache."""
    kv_cache_gb: float = Field(default=0.0, ge=0)
    """Key-value cache in GiB; 0 takes what gpu_memory_utilization leaves, and 1 GiB on a CPU."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one model is spread over."""
    quantization: str = ""
    """vLLM's name of a quantisation done while loading, for example "fp8"; empty for none."""
    arguments: str = ""
    """More of vLLM's EngineArgs, as a JSON object, for example '{"enforce_eager": true}'."""
    staging_dir: str = ""
    """Folder for weights on their way to vLLM; empty takes /dev/shm where they fit twice, else state_dir."""
    start_s: float = Field(default=900.0, gt=0)
    """Longest time that vLLM may take to load the model, in seconds."""
    stuck_s: float = Field(default=180.0, gt=0)
    """vLLM is restarted when it makes no progress for so long, in seconds; the first batch compiles."""


class EngineSection(Section):
    """The generation engine on this host."""

    kind: Literal["transformers", "vllm"] = "transformers"
    """Library that generates."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that the engine computes in; auto is float32 on a CPU (twice as fast there) and bfloat16 elsewhere."""
    max_batch_rows: int = Field(default=128, ge=1, le=16_384)
    """Most completions generated at the same time."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of the engine; 0 leaves the choice to the library."""
    vllm: VllmSection = VllmSection()


class RewardSection(Section):
    """The local reward service."""

    address: OptionalLocalKey = ""
    """Socket of a running reward service, for example unix:///run/heterorl/reward.sock; empty starts one."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Grader processes of a reward service started here."""
    attempts: int = Field(default=3, ge=1)
    """Tries to score a group when the grader itself fails, before the group is dropped and counted."""
    allow_code: bool = False
    """Let the learner use the grader `code`: this host then runs programs that a model wrote, in a sandbox without
    network. The risk is this host's: see docs/rewards.md for what the sandbox does not protect from."""
    allow_python: tuple[str, ...] = ()
    """Modules, with their submodules, of which the learner may have any function called, without a sandbox and with the
    rights of this sampler's user. The risk is this host's: list only modules that were written for it."""

    @model_validator(mode="after")
    def _allowed_where_it_runs(self) -> "RewardSection":
        if self.address and (self.allow_code or self.allow_python):
            raise ValueError(
                "reward.address names a running reward service: give --allow-code and --allow-python to that one, and"
                " remove reward.allow_code and reward.allow_python here"
            )
        return self


class SpoolSection(Section):
    """Scored groups on disk until the learner acknowledges them."""

    max_bytes: int = Field(default=1 << 30, ge=1 << 16)
    """Budget in bytes: at 80 % leasing stops, at 100 % generating stops."""


class SamplerConfig(Section):
    """The tree of sampler.toml."""

    connect: ConnectSection = ConnectSection()
    tls: TlsFiles | None = None
    """Certificates; needed unless connect.insecure."""
    state_dir: Path = Path("sampler-state")
    """Folder of the spool and the object cache. Locked by one sampler at a time."""
    engine: EngineSection = EngineSection()
    reward: RewardSection = RewardSection()
    spool: SpoolSection = SpoolSection()
    leases: int = Field(default=0, ge=0, le=16_384)
    """Leases held at once; 0 takes two engine batches."""
    decode_threads: int = Field(default=2, ge=1)
    """Threads that decode and verify new weights while the engine generates; beside an engine on CPUs fewer cost less
    speed, and more bring a version sooner."""
    delay: DelaySection = DelaySection()
    log: LogSection = LogSection()
    metrics_address: OptionalListenKey = ""
    """HOST:PORT of the Prometheus endpoint; empty for none."""

    def require_credentials(self) -> None:
        """Raises ConfigError where nothing says who this sampler is."""
        if self.tls is None and not self.connect.insecure:
            raise ConfigError("set [tls] (see `heterorl pki dev`), or connect.insecure = true on a loopback address")
        if self.connect.insecure and not self.connect.sampler_id:
            raise ConfigError("set connect.sampler_id: without a certificate the sampler has no name")

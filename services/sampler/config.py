"""The sampler's configuration: two facts of its own (learner address, credentials) and local resources.

Model, tokenizer, sampling parameters, reward, group size and staleness come from the learner at registration.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from services.runtime.config import Section
from services.runtime.log import LogSection
from services.wire.tls import TlsFiles


class ConnectSection(Section):
    """Where the learner is and who this sampler is."""

    learner: str = "localhost:7443"
    """HOST:PORT of the learner, or of a relay's learner."""
    weights: str = ""
    """HOST:PORT of a relay for weights; empty fetches from the learner."""
    sampler_id: str = ""
    """Name of this sampler; empty takes the id in the certificate."""
    insecure: bool = False
    """Connect without TLS: loopback addresses only."""
    give_up_s: float = Field(default=0.0, ge=0)
    """End with exit code 69 when the learner stays away this long, in seconds; 0 waits for ever."""


class EngineSection(Section):
    """The generation engine on this host."""

    kind: Literal["transformers", "vllm"] = "transformers"
    """Library that generates."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that the engine computes in; auto is float32 on a CPU (twice as fast there) and bfloat16 elsewhere."""
    max_batch_rows: int = Field(default=128, ge=1)
    """Most completions generated at the same time."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of the engine; 0 leaves the choice to the library."""


class RewardSection(Section):
    """The local reward service."""

    address: str = ""
    """Socket of a running reward service, for example unix:///run/heterorl/reward.sock; empty starts one."""
    workers: int = Field(default=1, ge=1)
    """Grader processes of a reward service started here."""
    attempts: int = Field(default=3, ge=1)
    """Tries to score a group when the grader itself fails, before the group is dropped and counted."""


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
    leases: int = Field(default=0, ge=0)
    """Leases held at once; 0 takes two engine batches."""
    log: LogSection = LogSection()
    metrics_address: str = ""
    """HOST:PORT of the Prometheus endpoint; empty for none."""

    @model_validator(mode="after")
    def _tls_or_insecure(self) -> "SamplerConfig":
        if self.tls is None and not self.connect.insecure:
            raise ValueError("set [tls] (see `heterorl pki dev`), or connect.insecure = true on a loopback address")
        if self.connect.insecure and not self.connect.sampler_id:
            raise ValueError("set connect.sampler_id: without a certificate the sampler has no name")
        return self

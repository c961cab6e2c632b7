"""The relay's configuration: where the learner is, where to listen, how much disk to use."""

from pathlib import Path

from pydantic import Field

from services.runtime.address import ListenKey, OptionalListenKey, TargetKey
from services.runtime.config import Section
from services.runtime.log import LogSection
from services.wire.tls import TlsFiles


class ConnectSection(Section):
    """Where the weights come from and who this relay is."""

    upstream: TargetKey = "localhost:7443"
    """HOST:PORT of the learner, or of another relay."""
    relay_id: str = "relay"
    """Name of this relay where there is no certificate to say it."""
    insecure: bool = False
    """Connect without TLS: loopback addresses only."""
    patience_s: float = Field(default=20.0, gt=0)
    """A fetch from upstream that makes no progress for this long, in seconds, fails: samplers then ask the learner."""


class ListenSection(Section):
    """The port that this site's samplers use as connect.weights, and the metrics."""

    address: ListenKey = "0.0.0.0:7444"
    """HOST:PORT of the gRPC server; port 0 takes a free one (printed)."""
    insecure: bool = False
    """Serve without TLS: loopback addresses only."""
    max_connections: int = Field(default=256, ge=1, le=100_000)
    """Most connections at once; a sampler opens connect.channels. One that stalls may take 1.2 MiB of memory."""
    metrics_address: OptionalListenKey = ""
    """HOST:PORT of the Prometheus endpoint; empty for none."""
    stall_s: float = Field(default=60.0, gt=0)
    """A sampler that takes nothing for this long, in seconds, is cut; it goes on where it was."""


class CacheSection(Section):
    """Objects on disk."""

    dir: Path = Path("relay-cache")
    """Folder of the cache. Locked by one relay at a time; what is in it may be removed while no relay runs."""
    max_bytes: int = Field(default=16 << 30, ge=1 << 20)
    """Bytes that the cache may use; what was used longest ago goes first, what is being fetched stays."""


class RelayConfig(Section):
    """The tree of relay.toml."""

    connect: ConnectSection = ConnectSection()
    listen: ListenSection = ListenSection()
    tls: TlsFiles | None = None
    """Certificates of this relay: it shows them to the learner and to samplers; needed unless both are insecure."""
    cache: CacheSection = CacheSection()
    log: LogSection = LogSection()

"""Where a process's certificates are, as a table of its config file. Imports nothing heavy: config modules use it.

`services.wire.certificates` makes and checks them, `services.wire.credentials` turns them into gRPC credentials.
"""

from pathlib import Path

from services.runtime.config import Section


class TlsFiles(Section):
    """Mutual TLS: who we are, and who may talk to us. All three are PEM files."""

    ca: Path
    """Certificate of the authority that signed both ends; nothing else is trusted."""
    certificate: Path
    """Our certificate; its SPIFFE URI is our identity."""
    key: Path
    """Private key of the certificate; keep it readable by this user alone (mode 0600)."""

    @classmethod
    def in_directory(cls, directory: Path, name: str) -> "TlsFiles":
        """The layout of `heterorl pki dev DIR`: ca.pem, NAME.pem, NAME-key.pem."""
        return cls(
            ca=directory / "ca.pem",
            certificate=directory / f"{name}.pem",
            key=directory / f"{name}-key.pem",
        )

"""gRPC credentials from our certificate files: mutual TLS, and rotation at the server without a restart."""

from datetime import UTC, datetime
from pathlib import Path

import grpc

from services.runtime.errors import HeteroRLError
from services.runtime.log import get_logger
from services.wire.certificates import OwnCertificate, check_to_dial, check_to_serve
from services.wire.identity import Identity
from services.wire.tls import TlsFiles

_log = get_logger("wire.tls")


def utc_now() -> datetime:
    return datetime.now(UTC)


def channel_credentials(files: TlsFiles) -> tuple[grpc.ChannelCredentials, Identity]:
    """Credentials to dial with, and who they say we are. Raises as `check_to_dial` does.

    A channel keeps the certificate it was made with: after a renewal, open a new channel.
    """
    own = check_to_dial(files, utc_now())
    return grpc.ssl_channel_credentials(own.ca_pem, own.key_pem, own.certificate_pem), own.identity


def server_credentials(files: TlsFiles) -> tuple[grpc.ServerCredentials, Identity]:
    """Credentials to serve with: clients must show a certificate of the same CA. Raises as `check_to_serve` does.

    The files are looked at again at each handshake; once they hold a new valid set, new connections get it.
    """
    own = check_to_serve(files, utc_now())
    source = _Rotation(files, own)
    credentials = grpc.dynamic_ssl_server_credentials(
        source.configuration,
        source.fetch,  # pyright: ignore[reportArgumentType] - None is "no change"; the stub does not know
        True,
    )
    return credentials, own.identity


class _Rotation:
    """Notices new certificate files. gRPC calls `fetch` from its own threads, one at a time under the GIL.

    A configuration is given to gRPC once. For each that it is given it makes a TLS context and drops the one before,
    which a handshake on another thread may be using (github.com/grpc/grpc/issues/36693): with one for each handshake
    the process crashed when several connections came at the same moment.
    """

    def __init__(self, files: TlsFiles, own: OwnCertificate) -> None:
        self._files = files
        self._seen = self._stamp()
        self._reported = ""
        self.configuration = _configuration(own)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """A new configuration, or None for no change. Never raises: gRPC would refuse every client from then on.

        A set that does not pass our own check (a certificate without its key yet, say) leaves the old one in use.
        """
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                own = check_to_serve(self._files, utc_now())
                self.configuration, self._seen = _configuration(own), stamp
                _log.info("certificate_rotated", identity=own.identity, expires=own.expires.isoformat())
                return self.configuration
        except Exception as error:  # a callback of gRPC is where a process's Python ends
            self._report(error)
        return None

    def _report(self, error: Exception) -> None:
        """Once for each fault: anybody can make handshakes."""
        if str(error) != self._reported:
            self._reported = str(error)
            expected = isinstance(error, HeteroRLError | OSError)
            _log.error("certificate_not_rotated", exc_info=None if expected else error, reason=error)

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_stamp_of(path) for path in (self._files.ca, self._files.certificate, self._files.key))


def _stamp_of(path: Path) -> tuple[int, int, int]:
    """Changes when the file is replaced or rewritten."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _configuration(own: OwnCertificate) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(own.key_pem, own.certificate_pem)], own.ca_pem)

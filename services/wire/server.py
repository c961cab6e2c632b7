"""gRPC servers: their limits, and binding them with one sentence for each way that it fails."""

import errno
import math
import resource
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import grpc

from services.runtime.address import Address, require_loopback
from services.runtime.errors import ConfigError, UnavailableError
from services.runtime.listening import listen_error
from services.wire.channel import MESSAGE_BYTES, Option

ServerRole: TypeAlias = Literal["learner", "relay", "reward"]

MAX_CONNECTIONS = 256
"""As shipped. Each that stalls costs about 1.2 MiB."""
_OTHER_FILES = 256
"""Open files of a learner or relay beside its connections: objects that are read, the journal, metrics."""

_LIMITS: tuple[Option, ...] = (
    ("grpc.so_reuseport", 0),  # on by default, and two servers then share a port silently
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 16384),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # identity only: no bombs below our own limits
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # below the clients' 20 s, or they get too_many_pings
)
_WIDE_AREA: tuple[Option, ...] = (
    ("grpc.max_concurrent_streams", 16),  # per connection
    ("grpc.http2.bdp_probe", 0),  # with the next: [M] 64 stalled uploads hold 78 MiB instead of 1.15 GiB
    ("grpc.http2.lookahead_bytes", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.http2.ping_timeout_ms", 15_000),  # keepalive_timeout_ms alone does not fire
    ("grpc.max_connection_age_ms", 3_600_000),  # bounds how long an expired certificate stays connected
    ("grpc.max_connection_age_grace_ms", 300_000),
    ("grpc.server_handshake_timeout_ms", 15_000),  # TCP without TLS is cut
)


def server_options(role: ServerRole, max_connections: int = MAX_CONNECTIONS) -> list[Option]:
    """learner and relay face the Internet; reward is a Unix socket of the same machine."""
    if role == "reward":
        return [*_LIMITS]
    return [*_LIMITS, *_WIDE_AREA, ("grpc.max_allowed_incoming_connections", max_connections)]


def build_server(
    role: ServerRole, interceptors: Sequence[grpc.aio.ServerInterceptor], max_connections: int = MAX_CONNECTIONS
) -> grpc.aio.Server:
    """A server without ports: add the services, `bind` it, start it.

    Raises ConfigError where this process may not open as many files as `max_connections` needs.
    """
    if role != "reward":
        _allow_files(max_connections + _OTHER_FILES)
    return grpc.aio.server(interceptors=list(interceptors), options=server_options(role, max_connections))


def _allow_files(count: int) -> None:
    """Raises the soft limit of open files, which most systems set to 1,024, as far as needed."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if hard < count:
        raise ConfigError(
            f"listen.max_connections ({count - _OTHER_FILES}) needs {count} open files, and this process may open"
            f" {hard}: lower it, or raise the limit (ulimit -n, LimitNOFILE=)"
        )
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, limits[1]))


def bind(server: grpc.aio.Server, address: Address, credentials: grpc.ServerCredentials | None) -> Address:
    """Binds before the start and returns the address with the port in use.

    credentials: None serves without TLS. Raises RefusedError (no TLS, and not a loopback address), UnavailableError
    (port in use), ConfigError (no such address on this machine, or a port that needs privileges).
    """
    if credentials is None:
        require_loopback(address)
    _probe(address)
    try:
        if credentials is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), credentials)
    except RuntimeError as error:  # somebody took the port since the probe
        raise listen_error(address, "gRPC", OSError(errno.EADDRINUSE, str(error))) from error
    return Address(host=address.host, port=port)


def bind_unix(server: grpc.aio.Server, path: Path) -> str:
    """Binds to a Unix socket for this user alone and returns its target, `unix:///path`.

    A socket file that nobody serves is left from a crash and is replaced. Raises UnavailableError if one is served, or
    none can be made there.
    """
    target = f"unix://{path.absolute()}"
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise UnavailableError(f"socket {path} is in use by another process: stop it or set another path")
            path.unlink(missing_ok=True)
    except UnavailableError:
        raise
    except OSError as error:  # the folder or the old socket is another user's, the name too long
        raise UnavailableError(f"cannot listen on socket {path}: {error.strerror or error}") from error
    try:
        server.add_insecure_port(target)
    except RuntimeError as error:
        raise UnavailableError(
            f"cannot listen on socket {path}: is its folder there, writable, its path short?"
        ) from error
    path.chmod(0o600)
    return target


def _probe(address: Address) -> None:
    """Binds and frees the address: gRPC says only that binding failed, the system says why."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise listen_error(address, "gRPC", OSError(errno.EADDRNOTAVAIL, error.strerror)) from error
    family, kind, protocol, _, name = found[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(name)
            probe.listen(1)
    except OSError as error:
        raise listen_error(address, "gRPC", error) from error

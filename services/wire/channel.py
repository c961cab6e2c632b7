"""Channels to a learner, relay or reward service. The settings and their reasons are measured: docs/protocol.md.

A sampler opens two channels, control and bulk, so that heartbeats do not queue behind weights ([M] 777 ms shared,
104 ms separate). It keeps both open: a cold one costs about 0.7 s and slow start.
"""

import ipaddress
import json
import os
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

import grpc

from services.runtime.address import Address, require_loopback
from services.runtime.errors import UsageError
from services.wire.identity import Identity

ChannelKind: TypeAlias = Literal["control", "bulk"]
Option: TypeAlias = tuple[str, int | str]

MESSAGE_BYTES = 4 << 20
"""Largest message either way. Weight chunks are at most 1 MiB ([M] event loop: 1 MiB 0.17 ms, 16 MiB 38 ms)."""

_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "waitForReady": True,
                # Streams leave this policy with their first message back; from there one reconnect loop is theirs.
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.5s",
                    "maxBackoff": "10s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


def channel_options(kind: ChannelKind, identity: Identity | None = None) -> list[Option]:
    """Options of a client channel. The bandwidth probe stays on here ([M] 107 MB/s with it, 9 MB/s without)."""
    name = identity.uri if identity is not None else f"heterorl-{kind}"
    return [
        ("grpc.primary_user_agent", name),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16384),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # identity only: no bombs below our own limits
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # the one that fires: [M] half-open peer found after 62 s → 4 s
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 10_000),  # [M] recovery after a 45 s outage: 25.4 s → 1.7 s
        ("grpc.use_local_subchannel_pool", 1),  # or both channels share one connection
        ("grpc.service_config", _SERVICE_CONFIG),
    ]


def open_channel(
    target: Address | str,
    credentials: grpc.ChannelCredentials | None,
    kind: ChannelKind,
    identity: Identity | None = None,
) -> grpc.aio.Channel:
    """A channel; it connects with its first call. Close it with `await channel.close()`.

    target: an Address, or `unix:///path` of a service on this machine. credentials: None dials without TLS, and raises
    RefusedError unless the target is local; `identity` then says who we are. Calls wait for the connection: give each
    a timeout.
    """
    address = str(target)
    options = channel_options(kind, None if credentials is not None else identity)
    local = address.startswith("unix:") if isinstance(target, str) else target.is_loopback
    if local or isinstance(target, str) or not proxy_to(target.host):
        options.append(("grpc.enable_http_proxy", 0))  # an http_proxy variable must not lead local calls astray
    if credentials is not None:
        return grpc.aio.secure_channel(address, credentials, options=options)
    if not isinstance(target, str):
        require_loopback(target)
    elif not local:
        raise UsageError(f"{target!r} is not unix:///path")
    return grpc.aio.insecure_channel(address, options=options)


def route_to(target: Address) -> str:
    """The address for people: with the proxy, where the environment sets one between us and it."""
    proxy = "" if target.is_loopback else proxy_to(target.host)
    return f"{target} (through the proxy of {proxy})" if proxy else str(target)


def proxy_to(host: str) -> str:
    """The variable that makes gRPC dial `host` through an HTTP proxy, as `https_proxy=http://10.0.0.9:3128`, without a
    password; empty where none does. As gRPC reads them, but that no_proxy may be `*`, which most programs know."""
    name = _first_set("grpc_proxy", "https_proxy", "http_proxy")
    url = os.environ.get(name, "")
    try:
        proxy = urlsplit(url)
        if not url.startswith("http://") or not proxy.hostname:
            return ""
    except ValueError:
        return ""
    spared = os.environ.get(_first_set("no_grpc_proxy", "no_proxy"), "")
    if any(_spares(entry.strip(), host) for entry in spared.split(",")):
        return ""
    return f"{name}={proxy.scheme}://{proxy.netloc.rpartition('@')[2]}"


def _first_set(*names: str) -> str:
    return next((name for name in names if name in os.environ), "")


def _spares(entry: str, host: str) -> bool:
    """Whether an entry of no_proxy names the host: a suffix of its name, a network that its address is in, or all."""
    if entry == "*" or (entry and host.lower().endswith(entry.lower())):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False

"""The relay process.

    own certificate ─► lock cache ─► bind ─► watch upstream ─► serve ─► SIGTERM ─► NOT_SERVING, watchers sent home ─► 0

Nothing here is trusted: samplers check signatures, object digests and roots themselves.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from heterorl.v1 import weights_pb2_grpc
from services.relay.bodies import Bodies
from services.relay.config import RelayConfig
from services.relay.disk_cache import DiskCache
from services.relay.link import Link
from services.relay.plans import PlanMemory
from services.relay.telemetry import RelayCollector
from services.relay.upstream import Upstream
from services.relay.weight_service import RelayWeightService
from services.runtime.address import Address, parse_listen, parse_target, require_loopback
from services.runtime.errors import ConfigError
from services.runtime.files import locked_directory
from services.runtime.lifecycle import Process
from services.runtime.log import get_logger
from services.runtime.metrics import metrics_served
from services.wire.channel import open_channel, route_to
from services.wire.credentials import channel_credentials, server_credentials
from services.wire.expiry import tell_of_expiry
from services.wire.identity import Identity, Role, require_id
from services.wire.interceptors import HEALTH_RULES, AccessRules, server_interceptors
from services.wire.server import bind, build_server

STOP_GRACE_S = 5.0
"""Fetches that did not end by themselves after the drain are cut this much later; samplers go on where they were."""

_ROLES = frozenset({Role.SAMPLER, Role.RELAY, Role.ADMIN})
_METHODS = ("WatchPolicy", "GetPlan", "FetchObject", "FollowUpdate")
_RULES: AccessRules = {
    **{f"/heterorl.v1.WeightService/{method}": _ROLES for method in _METHODS},
    **HEALTH_RULES,
}

_log = get_logger("relay")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Both sides of the relay, found good before anything is bound or dialled."""

    upstream: Address
    listen: Address
    identity: Identity
    dial: grpc.ChannelCredentials | None
    serve: grpc.ServerCredentials | None


def check_ends(config: RelayConfig) -> Ends:
    """Raises RefusedError or ConfigError (certificates, no TLS beyond loopback)."""
    upstream, listen = parse_target(config.connect.upstream), parse_listen(config.listen.address)
    if config.tls is None and not (config.connect.insecure and config.listen.insecure):
        raise ConfigError(
            "set [tls] (see `heterorl pki dev`), or connect.insecure and listen.insecure = true on loopback"
        )
    identity = Identity(role=Role.RELAY, id=require_id(config.connect.relay_id))
    dial: grpc.ChannelCredentials | None = None
    serve: grpc.ServerCredentials | None = None
    if config.tls is None or config.connect.insecure:
        require_loopback(upstream)
    else:
        dial, identity = channel_credentials(config.tls)
    if config.tls is None or config.listen.insecure:
        require_loopback(listen)
    else:
        serve, _ = server_credentials(config.tls)
    return Ends(upstream=upstream, listen=listen, identity=identity, dial=dial, serve=serve)


async def run_relay(config: RelayConfig, process: Process) -> None:
    """The main coroutine. Raises HeteroRLError subclasses with the exit codes of docs/operations.md."""
    ends = check_ends(config)
    async with AsyncExitStack() as stack:
        stack.enter_context(locked_directory(config.cache.dir))
        cache = await asyncio.to_thread(DiskCache, config.cache.dir / "objects", config.cache.max_bytes)
        server = build_server("relay", server_interceptors(_RULES), config.listen.max_connections)
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        address = bind(server, ends.listen, ends.serve)
        control = open_channel(ends.upstream, ends.dial, "control", ends.identity)
        stack.push_async_callback(control.close)
        bulk = open_channel(ends.upstream, ends.dial, "bulk", ends.identity)
        stack.push_async_callback(bulk.close)
        upstream = Upstream(
            control=weights_pb2_grpc.WeightServiceStub(control), bulk=weights_pb2_grpc.WeightServiceStub(bulk)
        )
        plans = PlanMemory(upstream)
        stack.push_async_callback(plans.close)
        bodies = Bodies(cache=cache, source=upstream, patience_s=config.connect.patience_s, on_gone=plans.forget)
        stack.push_async_callback(bodies.close)
        service = RelayWeightService(upstream=upstream, plans=plans, bodies=bodies, stall_s=config.listen.stall_s)
        weights_pb2_grpc.add_WeightServiceServicer_to_server(service, server)
        collector = RelayCollector(cache=cache, upstream=upstream, plans=plans, bodies=bodies, service=service)
        stack.enter_context(metrics_served(config.listen.metrics_address, collector))
        link = Link(channel=control, upstream=upstream, name=route_to(ends.upstream))
        beside = [
            process.tasks.create_task(work) for work in (upstream.watch(), link.report(), tell_of_expiry(config.tls))
        ]
        await server.start()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        process.say(f"relay listens on {address}")
        process.ready(f"relaying {ends.upstream} on {address}")
        try:
            await process.drain.wait()
        finally:
            await health.enter_graceful_shutdown()
            upstream.close()
            for task in beside:
                task.cancel()
            await server.stop(STOP_GRACE_S)
        _log.info(
            "relay_drained",
            bytes_fetched=upstream.bytes_fetched,
            bytes_served=service.bytes_served,
            hits=bodies.hits,
            misses=bodies.misses,
        )

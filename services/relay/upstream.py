"""The relay as a client: what the learner announces, its plans and its objects.

watch ─► latest (conflated: only the newest is kept) ─► wait_for_change, for every sampler that watches here
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc

from heterorl.v1 import weights_pb2
from services.runtime.backoff import Backoff
from services.runtime.errors import BadInputError, CorruptObjectError, ExhaustedError, ObjectGoneError, UnavailableError
from services.runtime.log import get_logger
from services.wire.convert import from_announcement
from services.wire.errors import peer_error
from services.wire.object_reader import ObjectReader
from services.wire.types import Announcement, ObjectRef, SignedManifest

if TYPE_CHECKING:  # generated stubs exist for type checkers only
    from heterorl.v1.weights_pb2_grpc import WeightServiceAsyncStub

_STALL_S = 20.0
_PLAN_S = 120.0
"""A learner may encode a keyframe first. The answer is remembered, so it is not lost on a sampler that gave up."""
_PLAN_AWAY_S = 1.5
"""With the watch down the learner is probably away: samplers are not kept waiting to learn it."""
_WHY_S = 10.0
"""gRPC tries a few times before it says why a connection fails: 4 s."""
_MOST_SIZES = 4096
_RETRIED = (UnavailableError, ExhaustedError, ObjectGoneError, CorruptObjectError)

_log = get_logger("relay.upstream")


class Upstream:
    """Two stubs, so that announcements and plans do not queue behind objects."""

    def __init__(self, *, control: "WeightServiceAsyncStub", bulk: "WeightServiceAsyncStub") -> None:
        self._control = control
        self._reader = ObjectReader(bulk, stall_s=_STALL_S)
        self._changed = asyncio.Event()
        self._closed = False
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self.announced: Announcement | None = None
        """The newest; its signature is for samplers to check."""
        self.connected = False
        """Whether the watch is up."""
        self.trouble = ""
        """Why the watch ended, until it brings something again; empty while there is none."""
        self.bytes_fetched = 0
        """Bytes of objects that came over the wide-area link."""

    async def watch(self) -> None:
        """For ever: keeps `latest` current. Raises RefusedError, ConfigError from upstream."""
        backoff = Backoff()
        while True:
            call = self._control.WatchPolicy(weights_pb2.WatchPolicyRequest())
            try:
                while isinstance(message := await call.read(), weights_pb2.WatchPolicyResponse):
                    self.connected, self.trouble = True, ""
                    backoff.reset()
                    self._announce(from_announcement(message))
            except grpc.aio.AioRpcError as rpc_error:
                error = peer_error(rpc_error)
                if not isinstance(error, _RETRIED):
                    raise error from None
                self.trouble = str(error)
                _log.info("watch_lost", error=error)
            except BadInputError as error:
                _log.error("announcement_refused", error=error)
            finally:
                self.connected = False
                call.cancel()
            await asyncio.sleep(backoff.next_delay_s())

    @property
    def latest(self) -> SignedManifest | None:
        """The newest version."""
        return None if self.announced is None else self.announced.manifest

    async def wait_for_change(self, seen: Announcement | None) -> Announcement | None:
        """*Waits for* a newest announcement that is not `seen`; *produces* it, or None once the relay drains."""
        while not self._closed and (self.announced is None or self.announced is seen):
            await self._changed.wait()
        return None if self._closed else self.announced

    async def unreachable_because(self) -> str:
        """Why no connection comes about, in gRPC's words; empty where upstream answers. Takes seconds."""
        call = self._control.WatchPolicy(weights_pb2.WatchPolicyRequest(), wait_for_ready=False, timeout=_WHY_S)
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return error.details() or "no reason given"
            return f"no answer within {_WHY_S:.0f} s" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else ""
        finally:
            call.cancel()
        return ""

    def close(self) -> None:
        """Ends every `wait_for_change`."""
        self._closed = True
        self._wake()

    async def plan(self, request: weights_pb2.GetPlanRequest) -> weights_pb2.GetPlanResponse:
        """Upstream's answer. Raises what it raised, UnavailableError when it is away."""
        timeout_s = _PLAN_S if self.connected else _PLAN_AWAY_S
        try:
            return await self._control.GetPlan(request, timeout=timeout_s, wait_for_ready=self.connected)
        except grpc.aio.AioRpcError as error:
            raise peer_error(error) from None

    def note_sizes(self, objects: Iterable[ObjectRef]) -> None:
        """Remembers what upstream said of the newest objects."""
        for ref in objects:
            self._sizes[ref.object_id] = ref.size_bytes
        while len(self._sizes) > _MOST_SIZES:
            self._sizes.popitem(last=False)

    def size_of(self, object_id: str) -> int | None:
        """The object's bytes; None where upstream did not say."""
        return self._sizes.get(object_id)

    async def fetch(self, object_id: str, offset: int) -> AsyncGenerator[bytes]:
        """As ObjectReader.read."""
        async with contextlib.aclosing(self._reader.read(object_id, offset)) as chunks:
            async for data in chunks:
                self.bytes_fetched += len(data)
                yield data

    def _announce(self, announcement: Announcement) -> None:
        for update in (announcement.update, announcement.coming):
            self.note_sizes(update.objects if update is not None else ())
        manifest = announcement.manifest
        if self.latest is not None and self.latest.manifest == manifest.manifest:
            return  # a reconnection says again what is known
        self.announced = replace(announcement, coming=None)
        _log.info("version_announced", version=manifest.decoded.version, root=manifest.decoded.root[:12])
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

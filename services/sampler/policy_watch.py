"""What the learner says of its policy: the newest version, the update that was made for it, the one being made.

WatchPolicy ─► signature, run ─► target (older ones are forgotten)
                              ├► offered: its update, to be tried once
                              └► arrivals: the objects of the next one's update, as they are named
"""

import asyncio

import grpc

from heterorl.v1 import weights_pb2
from services.runtime.backoff import Backoff
from services.runtime.errors import (
    BadInputError,
    CorruptObjectError,
    ExhaustedError,
    InputMissingError,
    ObjectGoneError,
    StorageError,
    UnavailableError,
)
from services.runtime.log import get_logger
from services.sampler.arrivals import Arrivals
from services.sampler.weight_sources import WeightSources
from services.wire.convert import from_announcement
from services.wire.delta import WrongBaseError
from services.wire.errors import peer_error
from services.wire.signing import verify
from services.wire.types import Announcement, Manifest, Plan, SignedManifest

RETRIED = (
    UnavailableError,
    ExhaustedError,
    ObjectGoneError,
    CorruptObjectError,
    WrongBaseError,
    StorageError,
    InputMissingError,  # a file that was removed before it was read
)

_log = get_logger("sampler.follower")


class PolicyWatch:
    """Announcements come from the learner, never from a relay. `public_key` is empty where manifests are unsigned."""

    def __init__(self, sources: WeightSources, run_id: str, public_key: bytes) -> None:
        self._sources = sources
        self._run_id = run_id
        self._public_key = public_key
        self._offered: Announcement | None = None
        """The newest announcement, until its update was tried once: after a failure GetPlan finds the way."""
        self._news = asyncio.Event()
        self.target: Manifest | None = None
        """The newest version."""
        self.arrivals: Arrivals | None = None
        """The update that the learner is making."""

    async def run(self) -> None:
        """For ever: keeps the target at the newest announcement. Raises RefusedError, ConfigError from the server."""
        backoff = Backoff()
        while True:
            call = self._sources.learner.stub.WatchPolicy(weights_pb2.WatchPolicyRequest(run_id=self._run_id))
            try:
                while isinstance(message := await call.read(), weights_pb2.WatchPolicyResponse):
                    self._announce(from_announcement(message))
                    backoff.reset()
            except grpc.aio.AioRpcError as rpc_error:
                error = peer_error(rpc_error)
                if not isinstance(error, RETRIED):
                    raise error from None
                _log.info("watch_lost", error=error)
            except BadInputError as error:
                _log.error("announcement_refused", error=error)
            finally:
                call.cancel()
                self.give_up_arrivals()
            await asyncio.sleep(backoff.next_delay_s())

    async def news(self) -> None:
        """Waits for an announcement, or `again`."""
        await self._news.wait()
        self._news.clear()

    def again(self) -> None:
        """What was announced has to be looked at again."""
        self._news.set()

    def take_offered(self, held_root: str) -> Plan | None:
        """The announced update as a plan, once, where it starts from what is held ("" for nothing)."""
        offered, self._offered = self._offered, None
        if offered is None or offered.update is None or offered.update.base_root != held_root:
            return None
        return Plan(target=offered.manifest, steps=(offered.update,))

    def give_up_arrivals(self) -> None:
        """Nothing more is made of them."""
        if self.arrivals is not None:
            self.arrivals.give_up()
            self.arrivals = None

    def check_signed(self, signed: SignedManifest) -> Manifest:
        """Raises CorruptObjectError for a signature that is not the learner's, BadInputError for another run."""
        if self._public_key:
            verify(self._public_key, signed.manifest, signed.signature)
        if signed.decoded.run_id != self._run_id:
            raise BadInputError(f"a manifest is of run {signed.decoded.run_id[:80]}, not {self._run_id}")
        return signed.decoded

    def _announce(self, announcement: Announcement) -> None:
        target, coming = self.check_signed(announcement.manifest), announcement.coming
        if announcement.update is not None or target != self.target:
            self._offered = announcement
        self.target = target
        if self.arrivals is not None:
            self.arrivals.hear(announcement)
            if self.arrivals.over:
                self.arrivals = None
        if self.arrivals is None and coming is not None and coming.first == 0:
            self.arrivals = Arrivals(coming, target.full_bytes)
        self._news.set()

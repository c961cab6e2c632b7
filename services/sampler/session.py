"""The sampler's standing with the learner: registration, registering again after a learner's restart, fenced calls."""

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from heterorl.v1 import control_pb2
from services.runtime.address import Address
from services.runtime.backoff import Backoff
from services.runtime.errors import (
    ExhaustedError,
    MismatchError,
    SessionLostError,
    UnavailableError,
)
from services.runtime.log import get_logger
from services.sampler.spool import Spool
from services.wire.channel import route_to
from services.wire.convert import from_run_settings, from_session, to_engine
from services.wire.errors import no_learner, peer_error
from services.wire.types import FEATURES, PROTOCOL_VERSION, EngineInfo, RunSettings, Session

if TYPE_CHECKING:  # generated stubs exist for type checkers only
    from heterorl.v1.control_pb2_grpc import ControlServiceAsyncStub

_log = get_logger("sampler.session")
_TIMEOUT_S = 10.0
_FIXED: dict[str, Callable[[RunSettings], object]] = {
    "model or tokenizer": lambda settings: settings.model_files_sha256,
    "signing key": lambda settings: settings.manifest_public_key,
    "graders": lambda settings: settings.graders,
    "system prompt": lambda settings: settings.system_prompt,
}
"""What parts of this process were built from; the rest of the settings is read anew for every group."""
_T = TypeVar("_T")


class LearnerSession:
    """One registration at a time; every call that names a session goes through `call`."""

    def __init__(
        self,
        *,
        control: "ControlServiceAsyncStub",
        learner: Address,
        sampler_id: str,
        spool: Spool,
        engine: Callable[[], EngineInfo | None],
        give_up_s: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._control = control
        self.learner = route_to(learner)
        """Its address, for people."""
        self._sampler_id = sampler_id
        self._spool = spool
        self._engine = engine
        self._give_up_s = give_up_s
        self._draw = draw
        self._renewing = asyncio.Lock()
        self._session: Session | None = None
        self._settings: RunSettings | None = None
        self._last_contact = time.monotonic()
        self.heartbeat_interval_s = 10.0
        self.learner_version = 0
        """The learner's policy version, as last heard."""

    @property
    def session(self) -> Session:
        assert self._session is not None, "register first"
        return self._session

    @property
    def settings(self) -> RunSettings:
        assert self._settings is not None, "register first"
        return self._settings

    async def register(self) -> None:
        """Registers, however long it takes for the learner to answer.

        Raises UnavailableError after give_up_s of silence, MismatchError (protocol), SessionLostError (another run
        than before, or settings that need a new process), RefusedError (identity), FencedError.
        """
        backoff = Backoff(uniform=lambda _, longest: longest * self._draw())
        _log.info(f"registering with learner {self.learner}", learner=self.learner)
        while True:
            try:
                response = await self._control.Register(self._request(), timeout=_TIMEOUT_S, wait_for_ready=False)
                break
            except grpc.aio.AioRpcError as rpc_error:
                error = peer_error(rpc_error)
                if rpc_error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise no_learner(self.learner) from None
                if not isinstance(error, UnavailableError | ExhaustedError):
                    raise error from None
            wait_s = max(backoff.next_delay_s(), 0.1)
            after = "patience has ended" if self._out_of_patience else f"next try in {wait_s:.1f} s"
            _log.warning(
                f"learner {self.learner} does not answer, {after}",
                learner=self.learner,
                error=error,
            )
            self.check_patience()
            await asyncio.sleep(wait_s)
        self._accept(response)
        await self._spool.bind(self.session.run_id, self._sampler_id)

    async def call(self, send: Callable[[Session], Awaitable[_T]]) -> _T:
        """Makes one call under the current session.

        Raises what the learner raised. When it says that the session is over, registers again, and raises
        UnavailableError: the caller tries again as it does for a lost connection.
        """
        session = self.session
        try:
            answer = await send(session)
        except grpc.aio.AioRpcError as rpc_error:
            raise await self.after_failure(session, rpc_error) from None
        self._last_contact = time.monotonic()
        return answer

    async def after_failure(self, session: Session, rpc_error: grpc.aio.AioRpcError) -> Exception:
        """What to raise for a failed call made under `session`; registers again first where that is the answer."""
        error = peer_error(rpc_error)
        if not isinstance(error, SessionLostError):
            return error
        async with self._renewing:
            if self._session is session:
                _log.info("registering_again", reason=error)
                await self.register()
        return UnavailableError("the session was renewed: try again")

    def check_patience(self) -> None:
        """Raises UnavailableError when the learner has been silent for longer than connect.give_up_s."""
        if self._out_of_patience:
            raise UnavailableError(
                f"learner {self.learner} has not answered for {self._silent_s:.0f} s: is it running?"
            )

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._last_contact

    @property
    def _out_of_patience(self) -> bool:
        return 0 < self._give_up_s < self._silent_s

    def _request(self) -> control_pb2.RegisterRequest:
        return control_pb2.RegisterRequest(
            sampler_id=self._sampler_id,
            protocol_min=PROTOCOL_VERSION,
            protocol_max=PROTOCOL_VERSION,
            features=sorted(FEATURES),
            hostname=socket.gethostname(),
            engine=to_engine(self._engine()),
            spool_id=self._spool.spool_id,
            last_run_id=self._spool.run_id,
        )

    def _accept(self, response: control_pb2.RegisterResponse) -> None:
        session, settings = from_session(response.session), from_run_settings(response.settings)
        if response.protocol_version != PROTOCOL_VERSION:
            raise MismatchError(f"the learner chose protocol {response.protocol_version}, unknown here: update one end")
        if self._session is not None and self._settings is not None:
            if session.run_id != self._session.run_id:
                raise SessionLostError(f"the learner now serves run {session.run_id}: start the sampler again for it")
            if changed := [name for name, read in _FIXED.items() if read(settings) != read(self._settings)]:
                raise SessionLostError(f"the learner's {' and '.join(changed)} changed: start the sampler again")
        self._session, self._settings = session, settings
        self.heartbeat_interval_s = max(0.05, response.heartbeat_interval_ms / 1000)
        self.learner_version = response.learner_version
        self._last_contact = time.monotonic()
        _log.info(
            "registered",
            learner=self.learner,
            run_id=session.run_id,
            learner_epoch=session.learner_epoch,
            session_epoch=session.session_epoch,
            learner_version=response.learner_version,
        )

"""Heartbeats: the sampler's report to the learner, and what the learner asks back."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from heterorl.v1 import control_pb2
from services.runtime.backoff import set_within
from services.runtime.errors import ExhaustedError, UnavailableError
from services.runtime.log import get_logger
from services.sampler.engine import Engine
from services.sampler.follower import Follower
from services.sampler.rollout import Rollout
from services.sampler.session import LearnerSession
from services.sampler.spool import Spool
from services.sampler.tally import Tally
from services.wire.convert import to_heartbeat
from services.wire.types import SamplerReport, SamplerState

if TYPE_CHECKING:  # generated stubs exist for type checkers only
    from heterorl.v1.control_pb2_grpc import ControlServiceAsyncStub

_log = get_logger("sampler.heartbeat")
_TIMEOUT_S = 10.0
_JITTER = 0.2
_PAUSED_INTERVAL_S = 2.0
"""A paused sampler asks for no leases, so only a heartbeat can tell it to go on or to go home."""
_ASK_WHY_S = 30.0
"""By then keepalive has found that a connection is dead, and gRPC knows why there is no new one."""
_REPEAT_S = 60.0


class Heartbeat:
    """`drain` is called when the learner asks for it. Setting `news` sends the next report at once."""

    def __init__(
        self,
        *,
        control: "ControlServiceAsyncStub",
        session: LearnerSession,
        follower: Follower,
        spool: Spool,
        tally: Tally,
        engine: Engine,
        drain: Callable[[], None],
        news: asyncio.Event,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control = control
        self._session = session
        self._follower = follower
        self._spool = spool
        self._tally = tally
        self._engine = engine
        self._drain = drain
        self._news = news
        self._draw = draw
        self._clock = clock
        self._answered = True
        self._ask_why_at_s = 0.0
        self.rollout: Rollout | None = None
        """Set when groups can be made; before that the sampler reports STARTING."""
        self.draining = False

    async def run(self) -> None:
        """For ever, every interval ± 20 % (at most 2 s while paused), and when there is news.

        Raises FencedError, RefusedError, ConfigError from the learner, UnavailableError after connect.give_up_s."""
        while True:
            await self.beat()
            interval_s = self._session.heartbeat_interval_s
            if self.rollout is not None and self.rollout.paused:
                interval_s = min(interval_s, _PAUSED_INTERVAL_S)
            await set_within(self._news, interval_s * (1 + _JITTER * (2 * self._draw() - 1)))
            self._news.clear()

    async def beat(self) -> None:
        """One report, and its directives carried out. A learner that does not answer is logged and waited for; a report
        now and then does not wait, so that it fails with gRPC's reason why nobody is reached."""
        report = self.report()
        ask_why = not self._answered and self._clock() >= self._ask_why_at_s
        timeout_s = _TIMEOUT_S if ask_why else min(_TIMEOUT_S, self._session.heartbeat_interval_s * 2)
        under = self._session.session
        try:
            answer = await self._session.call(
                lambda session: self._control.Heartbeat(
                    to_heartbeat(session, report), timeout=timeout_s, wait_for_ready=False if ask_why else None
                )
            )
        except (UnavailableError, ExhaustedError) as error:
            if self._session.session is not under:
                return  # a learner that restarted: it is registered with again, and the next report is for it
            if self._answered or ask_why:
                _log.warning("learner_silent", learner=self._session.learner, error=error)
                self._ask_why_at_s = self._clock() + (_ASK_WHY_S if self._answered else _REPEAT_S)
            self._answered = False
            self._session.check_patience()
            return
        if not self._answered:
            _log.info("learner_back", spool_groups=self._spool.groups)
        self._answered = True
        self._session.learner_version = answer.learner_version
        self._obey(answer)

    def report(self) -> SamplerReport:
        """The sampler now."""
        rollout, tally = self.rollout, self._tally
        return SamplerReport(
            state=self.state(),
            policy_version=max(0, self._follower.version),
            policy_root=self._follower.root,
            lease_ids=() if rollout is None else rollout.lease_ids,
            spool_groups=self._spool.groups,
            spool_bytes=self._spool.bytes,
            groups_total=tally.groups,
            tokens_total=tally.tokens,
            weights_bytes_received=tally.weights_bytes,
            tokens_per_s=tally.tokens_per_s,
            fetch=tally.fetch,
            last_swap_pause_ms=1000 * tally.swap_pause_s,
            engine_restarts=self._engine.restarts,
            grader_restarts=tally.reward_restarts,
            groups_dropped=dict(tally.dropped),
            engine=self._engine.info,
        )

    def state(self) -> SamplerState:
        """What it is doing, in one word: the first that applies."""
        if self.rollout is None:
            return SamplerState.STARTING
        for applies, state in (
            (self.draining, SamplerState.DRAINING),
            (self._follower.swapping, SamplerState.SWAPPING),
            (not self._spool.room.is_set(), SamplerState.SPOOL_FULL),
            (self.rollout.in_engine > 0, SamplerState.GENERATING),
            (self.rollout.paused, SamplerState.PAUSED),
        ):
            if applies:
                return state
        return SamplerState.WAITING_FOR_LEASES

    def _obey(self, answer: control_pb2.HeartbeatResponse) -> None:
        if self.rollout is None or self.draining:
            return
        self.rollout.abandon(answer.lost_lease_ids)
        if answer.directive == control_pb2.DIRECTIVE_DRAIN:
            self._drain()
            return
        pause = answer.directive == control_pb2.DIRECTIVE_PAUSE
        if pause != self.rollout.paused:
            _log.info("paused" if pause else "resumed")
            self.rollout.pause(pause)

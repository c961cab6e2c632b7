"""Says in the log that upstream is not reached, why, and when it is (again).

Calls wait for the connection, so none of them fails while nobody listens: without this a relay would be silent.
"""

import asyncio
import time
from collections.abc import Callable

import grpc

from services.relay.upstream import Upstream
from services.runtime.log import get_logger

_WARN_AFTER_S = 5.0
"""A learner that restarts, or a link that blinks, is no news."""
_REPEAT_S = 60.0

_log = get_logger("relay.upstream")


class Link:
    """Upstream is reached while the channel is connected and the watch is not turned away. `name` is for the log."""

    def __init__(
        self,
        *,
        channel: grpc.aio.Channel,
        upstream: Upstream,
        name: str,
        warn_after_s: float = _WARN_AFTER_S,
        repeat_s: float = _REPEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._upstream = upstream
        self._name = name
        self._warn_after_s = warn_after_s
        self._repeat_s = repeat_s
        self._clock = clock
        self._ready = False
        self._said: bool | None = None
        """What the log says last: reached, not reached, or nothing yet."""
        self._away_since_s: float | None = clock()
        self._warn_at_s = self._away_since_s + warn_after_s
        self._hear_by_s = self._away_since_s + repeat_s

    async def report(self) -> None:
        """For ever. *Waits for* changes of the connection, `warn_after_s` at most; *produces* lines of the log; *on
        cancel* nothing is left."""
        change: asyncio.Task[None] | None = None
        try:
            while True:
                state = self._channel.get_state(try_to_connect=True)
                if change is None or change.done():  # never given up while it waits: gRPC would keep each for ever
                    change = asyncio.create_task(self._channel.wait_for_state_change(state))
                await self._look(state is grpc.ChannelConnectivity.READY)
                await asyncio.wait((change,), timeout=self._warn_after_s)
        finally:
            if change is not None:
                change.cancel()

    async def _look(self, ready: bool) -> None:
        now_s = self._clock()
        if ready and not self._ready:
            self._upstream.trouble = ""  # that of an earlier connection
        if self._upstream.connected or not self._ready:
            self._hear_by_s = now_s + self._repeat_s
        self._ready = ready
        if ready and not self._upstream.trouble:
            self._reached()
            self._listen(now_s)
            return
        if self._away_since_s is None:
            self._away_since_s, self._warn_at_s = now_s, now_s + self._warn_after_s
        if now_s < self._warn_at_s:
            return
        reason = self._upstream.trouble if ready else await self._upstream.unreachable_because()
        if not reason or (not ready and self._channel.get_state() is grpc.ChannelConnectivity.READY):
            return  # it came back while we asked
        self._said, self._warn_at_s = False, now_s + self._repeat_s
        away_s = round(self._clock() - self._away_since_s, 1)
        _log.warning("upstream_not_reached", upstream=self._name, away_s=away_s, reason=reason)

    def _reached(self) -> None:
        if self._said is not True:
            _log.info("upstream_reached", upstream=self._name)
        self._said, self._away_since_s = True, None

    def _listen(self, now_s: float) -> None:
        """Two relays that are each other's upstream are connected, and have nothing to say for ever."""
        if now_s < self._hear_by_s:
            return
        self._hear_by_s = now_s + self._repeat_s
        why = "no version came from it: is it a relay without a learner, or this relay itself?"
        _log.warning("upstream_announces_nothing", upstream=self._name, reason=why)

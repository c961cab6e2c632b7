"""The end of a run: every live sampler gets the last version, then all are told to go home."""

import asyncio
from collections.abc import Callable

from services.learner.data_plane import DataPlane
from services.learner.sessions import Sampler
from services.runtime.log import get_logger
from services.wire.types import SamplerState

_LEAST_WAIT_S = 30.0
_HEARTBEATS = 4
"""How many heartbeats a sampler gets to report that it did what it was asked."""
_LOOK_S = 0.1

_log = get_logger("learner.finishing")


async def send_home(plane: DataPlane, final_root: str, heartbeat_s: float) -> None:
    """*Waits for* each live sampler to hold the weights `final_root`, then for each to have heard the drain and to have
    an empty spool; both waits are bounded, and a sampler that is lost is not waited for; *on cancel* stops waiting."""
    patience_s = max(_LEAST_WAIT_S, _HEARTBEATS * heartbeat_s)
    plane.sessions.paused = True
    plane.leases.wake()
    await _wait(plane, patience_s, "following", lambda sampler: _root(sampler) == final_root)
    plane.sessions.draining = True
    plane.leases.wake()
    await _wait(plane, patience_s, "draining", _is_drained)


async def _wait(plane: DataPlane, patience_s: float, what: str, done: Callable[[Sampler], bool]) -> None:
    """Heartbeats bring the news, so it looks again a few times per heartbeat rather than being told."""

    def missing() -> list[str]:
        return [s.sampler_id for s in plane.sessions.all() if not plane.sessions.is_lost(s) and not done(s)]

    try:
        async with asyncio.timeout(patience_s):
            while missing():  # noqa: ASYNC110 - time alone makes a sampler lost: no event would tell
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        _log.warning("samplers_not_waited_for", what=what, samplers=missing())


def _root(sampler: Sampler) -> str:
    return sampler.report.policy_root if sampler.report is not None else ""


def _is_drained(sampler: Sampler) -> bool:
    report = sampler.report
    return report is not None and report.state is SamplerState.DRAINING and report.spool_groups == 0

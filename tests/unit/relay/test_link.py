"""When the log says that upstream is not reached, and how often."""

import logging
from typing import Any, cast

import grpc
import pytest

from services.relay.link import Link


class Scripted:
    """A channel and an upstream, as far as a Link looks at them."""

    def __init__(self) -> None:
        self.state = grpc.ChannelConnectivity.TRANSIENT_FAILURE
        self.trouble = ""
        self.silent = False
        self.reason = "connection refused"

    @property
    def connected(self) -> bool:
        return self.state is grpc.ChannelConnectivity.READY and not self.trouble and not self.silent

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.state

    async def unreachable_because(self) -> str:
        return self.reason


class Site:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "heterorl")
        self.records = caplog.records
        self.now_s = 100.0
        self.far = Scripted()
        self.link = Link(
            channel=cast(Any, self.far), upstream=cast(Any, self.far), name="far:1", clock=lambda: self.now_s
        )

    async def pass_time(self, seconds: int, ready: bool) -> list[str]:
        """One look each second; what the log says."""
        before = len(self.records)
        self.far.state = grpc.ChannelConnectivity.READY if ready else grpc.ChannelConnectivity.TRANSIENT_FAILURE
        for _ in range(seconds):
            self.now_s += 1
            await self.link._look(ready)
        return [f"{record.levelname} {record.getMessage()}" for record in self.records[before:]]


AWAY, BACK = "WARNING upstream_not_reached", "INFO upstream_reached"


async def test_an_upstream_that_stays_away_is_one_warning_a_minute(caplog: pytest.LogCaptureFixture):
    site = Site(caplog)
    assert await site.pass_time(4, ready=False) == []
    assert await site.pass_time(1, ready=False) == [AWAY]
    assert site.records[-1].__dict__["heterorl_facts"] == {
        "upstream": "far:1",
        "away_s": 5.0,
        "reason": "connection refused",
    }
    assert await site.pass_time(59, ready=False) == []
    assert await site.pass_time(121, ready=False) == [AWAY] * 3
    assert await site.pass_time(200, ready=True) == [BACK]


async def test_a_connection_that_blinks_is_no_news(caplog: pytest.LogCaptureFixture):
    site = Site(caplog)
    assert await site.pass_time(3, ready=True) == [BACK]
    for _ in range(5):
        assert await site.pass_time(4, ready=False) == []
        assert await site.pass_time(4, ready=True) == []
    assert await site.pass_time(6, ready=False) == [AWAY]
    assert await site.pass_time(1, ready=True) == [BACK]


async def test_a_connected_upstream_that_turns_the_watch_away_is_not_reached(caplog: pytest.LogCaptureFixture):
    site = Site(caplog)
    assert await site.pass_time(1, ready=True) == [BACK]
    site.far.trouble = "the peer answered UNAVAILABLE: 503"
    assert await site.pass_time(6, ready=True) == [AWAY]
    assert site.records[-1].__dict__["heterorl_facts"]["reason"] == site.far.trouble
    assert await site.pass_time(1, ready=False) == []
    assert await site.pass_time(1, ready=True) == [BACK], "a new connection has no trouble yet"


async def test_an_upstream_that_comes_back_while_the_reason_is_asked_for_is_no_warning(
    caplog: pytest.LogCaptureFixture,
):
    site = Site(caplog)
    site.far.reason = ""
    assert await site.pass_time(10, ready=False) == []


async def test_an_upstream_that_announces_nothing_is_told_of_each_minute(caplog: pytest.LogCaptureFixture):
    """A relay whose learner is away, or two relays that are each other's upstream."""
    site, silence = Site(caplog), "WARNING upstream_announces_nothing"
    site.far.silent = True
    assert await site.pass_time(60, ready=True) == [BACK]
    assert await site.pass_time(120, ready=True) == [silence] * 2
    site.far.silent = False
    assert await site.pass_time(100, ready=True) == []
    site.far.silent = True
    assert await site.pass_time(59, ready=True) == []

"""A certificate that nears its end is told of, once a day, by the process that shows it."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.wire import expiry
from services.wire.expiry import tell_of_expiry
from services.wire.pki import LEAF_LIFE, RENEW_BEFORE, make_dev_pki
from services.wire.tls import TlsFiles

START = datetime(2026, 1, 15, 12, tzinfo=UTC)
END = START + LEAF_LIFE
DAY = timedelta(days=1)


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    make_dev_pki(tmp_path, ["eu-1"], [], START)
    return TlsFiles.in_directory(tmp_path, "learner")


class Calendar:
    """A clock that each sleep sets forward; it stops after `days`."""

    def __init__(self, now: datetime, days: int) -> None:
        self.now = now
        self._end = now + days * DAY

    def __call__(self) -> datetime:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        if self.now > self._end:
            raise asyncio.CancelledError


async def lines_of(
    files: TlsFiles, calendar: Calendar, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, **how: bool
) -> list[tuple[str, str]]:
    monkeypatch.setattr(expiry.asyncio, "sleep", calendar.sleep)
    caplog.set_level(logging.INFO)
    with pytest.raises(asyncio.CancelledError):
        await tell_of_expiry(files, clock=calendar, **how)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


async def test_nothing_is_said_of_a_certificate_that_pki_dev_would_keep(
    files: TlsFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = (LEAF_LIFE - RENEW_BEFORE).days - 1
    assert await lines_of(files, Calendar(START, days), caplog, monkeypatch) == []


async def test_it_is_told_each_day_and_then_that_it_is_over(
    files: TlsFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = await lines_of(files, Calendar(END - 2.5 * DAY, 4), caplog, monkeypatch)
    soon, over = ("WARNING", "certificate_expires_soon"), ("ERROR", "certificate_expired")
    assert said == [soon, soon, soon, over, over]


async def test_a_server_that_took_renewed_files_falls_silent_and_a_client_does_not(
    files: TlsFiles, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Renewing(Calendar):
        async def sleep(self, seconds: float) -> None:
            make_dev_pki(files.ca.parent, ["eu-1"], [], self.now)
            await super().sleep(seconds)

    server = await lines_of(files, Renewing(END - 20 * DAY, 9), caplog, monkeypatch, rotates=True)
    assert len(server) == 1
    caplog.clear()
    assert len(await lines_of(files, Renewing(END + 40 * DAY, 9), caplog, monkeypatch)) == 10


async def test_without_tls_there_is_nothing_to_tell() -> None:
    await asyncio.wait_for(tell_of_expiry(None), 1)

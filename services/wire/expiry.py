"""Says in the log that our certificate nears its end: after it no connection is made, and before it nothing else
would show it."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TypeAlias

from services.runtime.errors import HeteroRLError
from services.runtime.log import get_logger
from services.wire.certificates import parse_certificates, read_pem
from services.wire.credentials import utc_now
from services.wire.pki import RENEW_BEFORE
from services.wire.tls import TlsFiles

Clock: TypeAlias = Callable[[], datetime]

_AGAIN = timedelta(days=1)

_log = get_logger("wire.tls")


async def tell_of_expiry(files: TlsFiles | None, *, rotates: bool = False, clock: Clock = utc_now) -> None:
    """For ever; returns at once without TLS. *Waits for* a day, or for the certificate's end; *produces* a line of the
    log each day, from the day on when `heterorl pki dev` renews it; *on cancel* nothing is left.

    rotates: renewed files are taken without a restart. Who dials keeps what it read at its start.
    """
    if files is None:
        return
    expires = _end_of(files)
    while True:
        left = expires - clock()
        if left <= timedelta(0):
            _log.error("certificate_expired", certificate=files.certificate, expires=expires.isoformat())
        elif left <= RENEW_BEFORE:
            _log.warning(
                "certificate_expires_soon",
                certificate=files.certificate,
                expires=expires.isoformat(),
                days_left=left.days,
            )
        until_end = left if left > timedelta(0) else _AGAIN
        await asyncio.sleep(min(_AGAIN, until_end).total_seconds())
        if rotates:
            expires = _newest_end(files, expires)


def _end_of(files: TlsFiles) -> datetime:
    return parse_certificates(read_pem(files.certificate), files.certificate)[0].not_valid_after_utc


def _newest_end(files: TlsFiles, known: datetime) -> datetime:
    """Of the files as they are now; `known` while they cannot be read."""
    try:
        return _end_of(files)
    except HeteroRLError:
        return known

"""Journal rows for tests. Imports no torch: processes that are killed import it."""

import hashlib
from dataclasses import replace

from services.learner.journal_rows import PURPOSE_TRAIN, GroupRow
from services.wire.types import VerdictCode

RUN = "test-run"


def group_row(seq: int, **changes: object) -> GroupRow:
    """An accepted training group of sampler eu-1; its lease number is its seq."""
    payload = f"group {seq}".encode()
    row = GroupRow(
        sampler_id="eu-1",
        spool_id="spool",
        seq=seq,
        session_epoch=1,
        group_id=f"id-{seq}",
        content_sha256=hashlib.sha256(payload).digest(),
        verdict=VerdictCode.ACCEPTED,
        reason="",
        purpose=PURPOSE_TRAIN,
        lease_id=f"1-t{seq}-1",
        lease_number=seq,
        policy_version=0,
        tokens=6,
        longest=3,
        arrived_unix_ms=0,
        payload=payload,
    )
    return replace(row, **changes)

"""The journal on a real disk: what it holds after reopening, rewinding, and faults."""

import asyncio
import resource
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from services.learner import journal_schema
from services.learner.journal import Journal
from services.learner.journal_rows import PURPOSE_EVAL, RepeatRow
from services.learner.journal_schema import Recovered
from services.learner.published import VersionRow
from services.learner.tally import Tally, length_bucket
from services.runtime import failpoints
from services.runtime.errors import ConfigError, DiskFullError, HeteroRLError, StorageError
from services.wire.types import VerdictCode
from tests.support.journal_rows import RUN, group_row


async def opened(folder: Path) -> tuple[Journal, Recovered]:
    return await Journal.open(folder / "journal.sqlite3", RUN)


async def reopened(journal: Journal) -> tuple[Journal, Recovered]:
    await journal.close()
    return await Journal.open(journal.path, RUN)


async def pending_ids(journal: Journal) -> list[int]:
    return [row.id for row in await journal.pending()]


def repeat(seq: int, fresh: bool) -> RepeatRow:
    return RepeatRow(
        sampler_id="eu-1",
        spool_id="spool",
        seq=seq,
        verdict=VerdictCode.INVALID if fresh else VerdictCode.DUPLICATE,
        reason="ID_REUSE" if fresh else "",
        first=VerdictCode.ACCEPTED,
        fresh=fresh,
    )


async def test_every_start_raises_the_epoch_and_keeps_the_rest(tmp_path: Path) -> None:
    journal, first = await opened(tmp_path)
    assert (first.learner_epoch, first.heads, first.leases_next) == (1, {}, 0)
    assert [await journal.raise_session_epoch("eu-1") for _ in range(2)] == [1, 2]
    assert await journal.raise_eval_round() == 1
    await journal.record_leases(7, 3)
    await journal.set_denied("us-1", True)
    await journal.set_denied("us-2", True)
    await journal.set_denied("us-2", False)
    await journal.record_version(0, "aa")
    await journal.record_version(1, "bb")
    await journal.commit([group_row(1), group_row(2)], [repeat(3, False)])
    journal, second = await reopened(journal)
    assert (second.learner_epoch, second.leases_next, second.leases_floor) == (2, 7, 3)
    assert (second.denied, second.heads) == (frozenset({"us-1"}), {("eu-1", "spool"): 3})
    assert VersionRow(version=1, root="bb", retired=False) in second.versions
    assert await journal.raise_session_epoch("eu-1") == 3
    assert await journal.raise_eval_round() == 2
    await journal.close()


async def test_a_journal_of_another_run_or_format_or_no_journal_at_all_is_refused(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    await journal.close()
    with pytest.raises(ConfigError, match="belongs to run"):
        await Journal.open(journal.path, "walk")
    with sqlite3.connect(journal.path) as raw:
        raw.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
    raw.close()
    with pytest.raises(ConfigError, match="format 99, this release reads 1: start the release"):
        await opened(tmp_path)
    (tmp_path / "text").write_text("this is not a database " * 100)
    with pytest.raises(StorageError, match="is damaged"):
        await Journal.open(tmp_path / "text", RUN)


async def test_the_tally_is_the_same_counted_and_read_back(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    ids = await journal.commit(
        [
            group_row(1),
            group_row(2),
            group_row(3),
            group_row(4, verdict=VerdictCode.STALE),
            group_row(5, verdict=VerdictCode.INVALID, reason="LOGPROB_POSITIVE"),
            group_row(6, purpose=PURPOSE_EVAL),
            group_row(7, purpose=PURPOSE_EVAL, verdict=VerdictCode.LEASE_LOST),
        ],
        [repeat(8, False), repeat(9, True)],
        resent=2,
    )
    await journal.mark_trained([(ids[0], 4)], 1)
    await journal.mark_dropped([(ids[1], "STALE_IN_BUFFER"), (ids[0], "TOO_OLD")], 2)
    expected = Tally(acknowledged=6, trained=1, duplicates=3, evaluated=2)
    expected.dropped.update({"STALE": 1, "INVALID/LOGPROB_POSITIVE": 1, "INVALID/ID_REUSE": 1, "STALE_IN_BUFFER": 1})
    expected.staleness[4] = 1
    assert journal.tally == expected
    assert expected.buffered == 1
    journal, recovered = await reopened(journal)
    assert recovered.tally == expected
    assert await pending_ids(journal) == [ids[2]]
    await journal.close()


async def test_what_came_before_is_found_by_seq_and_by_id(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    row = group_row(1, verdict=VerdictCode.STALE)
    await journal.commit([row], [repeat(2, False), repeat(3, True)])
    found = await journal.find(
        [
            ("eu-1", "spool", 1, "id-1"),
            ("eu-1", "other", 1, "id-1"),
            ("us-1", "spool", 1, "id-1"),
            ("eu-1", "spool", 2, ""),
            ("eu-1", "spool", 3, ""),
            ("eu-1", "spool", (1 << 64) - 1, ""),
        ]
    )
    by_seq = [first.verdict if first else None for first, _ in found]
    by_id = [first.content_sha256 if first else None for _, first in found]
    assert by_seq == [VerdictCode.STALE, None, None, VerdictCode.ACCEPTED, VerdictCode.INVALID, None]
    assert by_id == [row.content_sha256, row.content_sha256, None, None, None, None]
    await journal.close()


async def test_a_group_trains_at_most_once(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    ids = await journal.commit([group_row(1), group_row(2)], [])
    await journal.mark_trained([(ids[0], 0)], 1)
    with pytest.raises(HeteroRLError, match="not pending"):
        await journal.mark_trained([(ids[1], 0), (ids[0], 1)], 2)
    assert await pending_ids(journal) == [ids[1]]  # and the other of that batch is not half trained
    await journal.close()


async def test_a_rewind_makes_later_groups_pending_and_drops_versions_that_are_gone(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    ids = await journal.commit([group_row(n, policy_version=n // 2) for n in range(6)], [])
    for version in range(3):
        await journal.record_version(version, f"{version:02}")
    await journal.mark_trained([(ids[0], 0), (ids[1], 0)], 1)
    await journal.mark_trained([(ids[2], 0)], 2)
    await journal.mark_dropped([(ids[3], "STALE_IN_BUFFER")], 2)
    await journal.rewind_to(1, 1)
    assert await pending_ids(journal) == [ids[2], ids[3]]
    assert (journal.tally.trained, journal.tally.dropped) == (2, {"FUTURE_VERSION": 2})
    assert journal.tally.buffered == 2
    journal, recovered = await reopened(journal)
    assert VersionRow(version=2, root="02", retired=True) in recovered.versions
    await journal.record_version(2, "02")
    journal, recovered = await reopened(journal)
    assert VersionRow(version=2, root="02", retired=False) in recovered.versions
    await journal.close()


async def test_a_rewind_brings_one_group_of_a_prompt_back_the_last_that_was_drawn(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    ids = await journal.commit([group_row(n, lease_number=n % 2) for n in range(4)], [])
    for step, ended in enumerate((ids[:2], ids[2:]), start=1):
        await journal.mark_dropped([(row_id, "STALE_IN_BUFFER") for row_id in ended], step)
    await journal.rewind_to(0, 0)
    assert await pending_ids(journal) == ids[2:]
    assert journal.tally.dropped == {"STALE_IN_BUFFER": 2}
    await journal.close()


async def test_a_rewind_counts_no_answer_of_a_version_that_is_gone(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    old, _ = await journal.commit([group_row(0, lease_number=1), group_row(1, lease_number=1, policy_version=2)], [])
    await journal.mark_dropped([(old, "STALE_IN_BUFFER")], 2)
    await journal.rewind_to(1, 1)
    assert await pending_ids(journal) == [old]
    assert journal.tally.dropped == {"FUTURE_VERSION": 1}
    await journal.mark_dropped([(old, "STALE_IN_BUFFER")], 2)
    (newer,) = await journal.commit([group_row(2, lease_number=1, policy_version=3)], [])
    await journal.mark_dropped([(newer, "STALE_IN_BUFFER")], 3)
    await journal.rewind_to(1, 1)
    assert await pending_ids(journal) == [old]
    await journal.close()


async def test_answered_prompts_are_those_whose_group_still_counts(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    ids = await journal.commit(
        [group_row(1), group_row(2), group_row(3), group_row(4, verdict=VerdictCode.INVALID, reason="X")], []
    )
    await journal.mark_trained([(ids[0], 0)], 1)
    await journal.mark_dropped([(ids[1], "STALE_IN_BUFFER")], 1)
    assert await journal.answered(0) == {1, 3}
    assert await journal.answered(2) == {3}
    await journal.close()


async def test_the_largest_numbers_of_the_wire_are_stored(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    row = group_row(1, policy_version=(1 << 64) - 1, verdict=VerdictCode.FUTURE_VERSION)
    await journal.commit([row], [])
    assert journal.tally.dropped == {"FUTURE_VERSION": 1}
    await journal.close()


async def test_a_failed_transaction_writes_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    failpoints.arm("journal.before_commit=1*error->off")
    try:
        with pytest.raises(StorageError):
            await journal.commit([group_row(1)], [])
    finally:
        failpoints.arm("")
    assert journal.tally == Tally()
    assert await journal.commit([group_row(1)], [])
    assert await asyncio.gather(*(journal.raise_session_epoch("eu-1") for _ in range(5))) == [1, 2, 3, 4, 5]
    await journal.close()


async def test_a_full_disk_can_be_waited_out_and_another_fault_cannot(tmp_path: Path) -> None:
    journal, _ = await opened(tmp_path)
    await journal.close()
    journal, _ = await Journal.open(journal.path, RUN)
    await journal._run(lambda connection: connection.execute("PRAGMA max_page_count = 1"))
    with pytest.raises(StorageError, match="full"):
        await journal.commit([group_row(1, payload=b"x" * 1_000_000)], [])
    assert journal.broken is None
    await journal._run(lambda connection: connection.execute("PRAGMA max_page_count = 100000"))
    await journal.commit([group_row(1)], [])
    with pytest.raises(StorageError):
        await journal.commit([replace(group_row(2), seq=1)], [])  # a constraint: our own fault, or a damaged file
    assert journal.broken is not None
    with pytest.raises(StorageError):
        await journal.commit([group_row(2)], [])
    await journal.close()


@pytest.mark.parametrize("used_up", [True, False])
async def test_a_used_up_quota_is_told_apart_from_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used_up: bool
) -> None:
    journal, _ = await opened(tmp_path)
    monkeypatch.setattr(journal_schema, "is_used_up", lambda directory: used_up and directory == tmp_path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # SQLite calls both an I/O error
    try:
        with pytest.raises(StorageError) as caught:
            await journal.commit([group_row(1, payload=b"x" * 2_000_000)], [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(caught.value, DiskFullError) is used_up
    assert (journal.broken is None) is used_up
    if used_up:
        await journal.commit([group_row(1)], [])
    await journal.close()


def test_lengths_fall_into_powers_of_two() -> None:
    assert [length_bucket(n) for n in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]

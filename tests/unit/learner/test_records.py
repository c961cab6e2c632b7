"""metrics.jsonl as those see it that follow it."""

import asyncio
import resource
import signal
from pathlib import Path

import pytest

from services.learner.records import Record, Records
from services.runtime.errors import StorageError


def record(step: int, **metrics: float) -> Record:
    return Record(step=step, wall_s=step / 2, metrics=metrics)


async def read(records: Records, from_step: int, count: int) -> list[Record]:
    follower = records.follow(from_step)
    async with asyncio.timeout(5):
        return [await anext(follower) for _ in range(count)]


async def test_a_follower_gets_what_is_there_and_then_what_comes(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl")
    records.rewind_to(0)
    for step in range(1, 2001):  # more than is read at once
        records.append(record(step, loss=0.125, lr=1e-6))
    assert await read(records, 5, 1996) == [record(step, loss=0.125, lr=1e-6) for step in range(5, 2001)]
    waiting = asyncio.create_task(read(records, 2001, 2))
    for step in (2001, 2002):
        await asyncio.sleep(0.01)
        records.append(record(step))
    assert await waiting == [record(2001), record(2002)]


async def test_a_restored_run_forgets_later_steps_and_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = Records(path)
    for step in (1, 2, 3):
        records.append(record(step))
    path.write_bytes(path.read_bytes() + b'{"step": 4, "wa')
    again = Records(path)
    again.rewind_to(2)
    again.append(record(3, loss=1.0))
    assert await read(again, 0, 3) == [record(1), record(2), record(3, loss=1.0)]


def test_a_restored_run_keeps_an_evaluation_that_ended_after_the_steps_that_it_forgets(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = Records(path)
    evaluation = record(2, eval_round=1.0)
    for one in (record(1), record(2), record(3), evaluation, record(4), record(4, eval_round=2.0)):
        records.append(one)
    assert records.rewind_to(2) == [evaluation]
    assert path.read_bytes() == b"".join(one.line() for one in (record(1), record(2), evaluation))


def test_a_line_that_does_not_fit_the_disk_leaves_no_half(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl")
    records.append(record(1))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(StorageError):
            records.append(record(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    records.append(record(2))

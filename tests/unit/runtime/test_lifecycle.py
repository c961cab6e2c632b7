"""Which error explains a failure, and what `run` does with it."""

import errno
import json
import logging

import pytest

from services.runtime.errors import (
    EngineError,
    ExhaustedError,
    FencedError,
    HeteroRLError,
    StorageError,
    UnavailableError,
)
from services.runtime.lifecycle import Process, explain, run
from services.runtime.log import JsonLines, get_logger

LOG = get_logger("test")


def test_the_first_error_of_nested_groups_explains_the_failure():
    first = StorageError("the disk is full")
    group = ExceptionGroup("a", [ExceptionGroup("b", [first, UnavailableError("gone")])])
    assert explain(group, LOG) is first


def test_an_error_that_forbids_a_restart_wins_over_the_failures_that_it_caused():
    fenced = FencedError("a newer learner took over")
    assert explain(ExceptionGroup("a", [UnavailableError("gone"), EngineError("stopped"), fenced]), LOG) is fenced


def test_a_fault_of_ours_becomes_an_id_and_its_text_stays_in_the_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        error = explain(ExceptionGroup("a", [KeyError("hunter2")]), LOG)
    assert (type(error), error.exit_code) == (HeteroRLError, 1)
    assert "hunter2" not in str(error)
    line = json.loads(JsonLines().format(caplog.records[-1]))
    assert line["error_id"] in str(error)
    assert "hunter2" in line["traceback"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (RuntimeError("can't start new thread"), "no more threads"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), "not enough"),
        (OSError(errno.EMFILE, "Too many open files"), "no more files"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "more processes"),
    ],
)
def test_a_limit_of_the_host_is_one_sentence_and_no_fault_of_ours(
    fault: Exception, sentence: str, caplog: pytest.LogCaptureFixture
):
    error = explain(ExceptionGroup("a", [fault]), LOG)
    assert (type(error), error.exit_code) == (ExhaustedError, 75)
    assert sentence in str(error)
    assert not caplog.records


def test_a_main_that_returns_ends_with_zero():
    async def main(process: Process) -> None:
        process.ready("serving")

    assert run(main, "test") == 0


def test_a_task_that_fails_ends_the_process_with_its_error():
    async def fails() -> None:
        raise StorageError("the disk is full: free some")

    async def main(process: Process) -> None:
        process.tasks.create_task(fails())
        await process.drain.wait()

    with pytest.raises(StorageError, match="the disk is full"):
        run(main, "test")


def test_a_drain_requested_twice_begins_once(caplog: pytest.LogCaptureFixture):
    async def main(process: Process) -> None:
        process.request_drain("run ended")
        process.request_drain("again")
        await process.drain.wait()

    with caplog.at_level(logging.INFO):
        run(main, "test")
    assert caplog.text.count("drain_started") == 1

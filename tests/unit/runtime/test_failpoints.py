"""Failpoints: their little language, their counts, their actions."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from services.runtime import failpoints
from services.runtime.errors import ConfigError, StorageError, UnavailableError


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_a_point_that_is_not_armed_passes():
    failpoints.arm("other=error")
    failpoints.hit("journal.commit")


def test_counted_terms_act_in_order_and_the_last_for_ever():
    failpoints.arm("journal.commit = 2*off -> 1*error(UnavailableError) -> error; spool.write=off")
    failpoints.hit("journal.commit")
    failpoints.hit("journal.commit")
    with pytest.raises(UnavailableError, match=r"failpoint journal\.commit"):
        failpoints.hit("journal.commit")
    for _ in range(3):
        with pytest.raises(StorageError):
            failpoints.hit("journal.commit")


def test_after_its_last_count_a_point_passes():
    failpoints.arm("a=1*error")
    with pytest.raises(StorageError):
        failpoints.hit("a")
    failpoints.hit("a")


def test_a_delay_holds_the_thread():
    failpoints.arm("a=delay(30)")
    before = time.monotonic()
    failpoints.hit("a")
    assert time.monotonic() - before >= 0.03


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "=kill",
        "a=",
        "a=explode",
        "a=-1*off",
        "a=delay",
        "a=delay(x)",
        "a=error(KeyError)",
        "a=off->",
        "a=kill b=off",
    ],
)
def test_a_text_that_is_not_understood_is_a_config_error(text: str):
    with pytest.raises(ConfigError, match="HETERORL_FAILPOINTS"):
        failpoints.arm(text)


def test_kill_ends_a_process_that_was_armed_by_its_environment_without_any_cleanup():
    program = """
from services.runtime.failpoints import hit
try:
    hit("a"); print("passed", flush=True); hit("a")
finally:
    print("cleaned up", flush=True)
"""
    environ = {**os.environ, "HETERORL_FAILPOINTS": "a=1*off->kill"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b"passed\n"

"""Real processes: signals, exit codes, systemd's protocol; and the metrics endpoint."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.runtime.errors import ConfigError, UnavailableError
from services.runtime.metrics import metrics_served

PROGRAM = """
import sys
from services.runtime.errors import HeteroRLError, StorageError
from services.runtime.lifecycle import Process, run

async def main(process: Process) -> None:
    process.ready("serving on port 1")
    print("ready", flush=True)
    await process.drain.wait()
    print("drained", flush=True)
    if "hang" in sys.argv:
        await __import__("asyncio").Event().wait()
    if "fail" in sys.argv:
        raise StorageError("the disk is full: free some")

try:
    sys.exit(run(main, "test"))
except HeteroRLError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


async def start(*arguments: str, **environ: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environ},
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


@pytest.fixture(autouse=True)
def children_hear_of_the_terminals_end() -> Generator[None]:
    """As where pytest itself does not run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_drains_and_ends_with_zero(number: signal.Signals):
    process = await start()
    process.send_signal(number)
    out, err = await process.communicate()
    assert (process.returncode, out) == (0, b"drained\n")
    assert b"Traceback" not in err


async def test_a_second_signal_ends_at_once():
    process = await start("hang")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"drained\n"
    process.send_signal(signal.SIGTERM)
    _, err = await process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert b"second SIGTERM: ending at once" in err


async def test_a_second_signal_ends_at_once_where_the_terminal_has_gone():
    ours, terminal = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, "hang", stdout=subprocess.PIPE, stderr=terminal
    )
    os.close(terminal)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert await process.stdout.readline() == b"drained\n"
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 128 + signal.SIGTERM


async def test_a_terminal_that_goes_away_drains_however_often_it_is_told_and_not_under_nohup():
    process = await start("hang")
    assert process.stdout is not None
    process.send_signal(signal.SIGHUP)
    assert await process.stdout.readline() == b"drained\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, err = await process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert b"SIGHUP" not in err.splitlines()[-1]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child inherits it
    try:
        process = await start()
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    out, err = await process.communicate()
    assert (process.returncode, out) == (0, b"drained\n")
    assert b"SIGHUP" not in err


async def test_an_error_after_the_drain_is_one_sentence_with_its_exit_code():
    process = await start("fail")
    process.send_signal(signal.SIGTERM)
    _, err = await process.communicate()
    assert process.returncode == 74
    assert err.decode().splitlines()[-1] == "the disk is full: free some"
    assert b"Traceback" not in err


async def test_a_wrong_failpoint_ends_the_process_at_its_start():
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HETERORL_FAILPOINTS": "a=explode"},
    )
    out, err = await process.communicate()
    assert (process.returncode, out) == (78, b"")
    assert b"HETERORL_FAILPOINTS: 'explode'" in err


async def test_systemd_hears_ready_status_watchdog_and_stopping(tmp_path: Path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.setblocking(False)
        loop = asyncio.get_running_loop()
        process = await start(NOTIFY_SOCKET=str(path), WATCHDOG_USEC="100000")
        heard: list[str] = []

        async def hear(wanted: str) -> None:
            async with asyncio.timeout(30):
                while not heard or heard[-1] != wanted:
                    heard.append((await loop.sock_recv(manager, 4096)).decode())

        await hear("READY=1\nSTATUS=serving on port 1")
        await hear("WATCHDOG=1")
        heard.clear()
        await hear("WATCHDOG=1")
        process.send_signal(signal.SIGTERM)
        await hear("STOPPING=1\nSTATUS=draining: SIGTERM")
        await process.communicate()
    assert process.returncode == 0


class OneMetric(Collector):
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("heterorl_learner_version_versions", "Newest version.", value=3)


def test_metrics_are_served_on_a_free_port_while_the_block_runs():
    with metrics_served("127.0.0.1:0", OneMetric()) as address:
        assert address is not None
        url = f"http://{address}/metrics"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as answer:
            assert b"heterorl_learner_version_versions 3.0" in answer.read()
    with pytest.raises(urllib.error.URLError):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20)


def test_a_connection_to_the_metrics_that_says_nothing_is_cut(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Each holds a thread and a file: a thousand of them ended a learner with "too many open files"."""
    monkeypatch.setattr("services.runtime.metrics._Scrape.timeout", 0.2)
    with metrics_served("127.0.0.1:0", OneMetric()) as address:
        assert address is not None
        with socket.create_connection((address.host, address.port), timeout=5) as silent:
            assert silent.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_a_metrics_port_in_use_and_a_strange_address_are_one_sentence():
    with metrics_served("127.0.0.1:0", OneMetric()) as address:
        in_use = pytest.raises(UnavailableError, match=r"\(metrics\) is in use by another process")
        with in_use, metrics_served(str(address), OneMetric()):
            pass
    with pytest.raises(ConfigError, match="cannot listen on 192"), metrics_served("192.0.2.1:0", OneMetric()):
        pass


def test_no_metrics_address_serves_nothing():
    with metrics_served("", OneMetric()) as address:
        assert address is None

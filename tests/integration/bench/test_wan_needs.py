"""A benchmark of hours does not begin where it could not end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the links are made of Linux network namespaces")


def bench_wan(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_wan", *words],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_that_is_missing_is_named_in_one_sentence_before_anything_is_made(tmp_path: Path) -> None:
    ended = bench_wan("--traces", str(tmp_path / "traces"), "--out", str(tmp_path / "wan.json"), path=tmp_path)
    assert ended.returncode == os.EX_UNAVAILABLE
    assert len(ended.stderr.splitlines()) == 1
    assert {"ip (apt-get install iproute2)", "nginx (apt-get install nginx-light)"} < set(
        ended.stderr.partition(": ")[2].rstrip(".\n").split("; ")
    )
    assert not list(tmp_path.iterdir())


def test_links_alone_need_no_web_server(tmp_path: Path) -> None:
    ended = bench_wan("--profiles", "0", "--out", str(tmp_path / "wan.json"), path=tmp_path)
    assert ended.returncode == os.EX_UNAVAILABLE
    assert "iproute2" in ended.stderr
    assert "nginx" not in ended.stderr


def test_help_needs_nothing(tmp_path: Path) -> None:
    assert bench_wan("--help", path=tmp_path).returncode == 0

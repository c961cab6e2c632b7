"""The GPU benchmark on a CPU: both ways make the same updates, and less crosses the bus than the weights."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.bench import bench_gpu


def test_it_measures_both_ways_and_the_swap() -> None:
    row = bench_gpu.measure("tiny", torch.device("cpu"), turns=1, workers=1)
    for codec in ("sx", "xc"):
        device, host = row[f"{codec}_device"], row[f"{codec}_host"]
        assert isinstance(device, dict)
        assert isinstance(host, dict)
        assert 0 < device["bus_bytes"] < host["bus_bytes"] == row["model_bytes"]
        assert device["gb_per_s"] > 0


def test_without_cuda_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_gpu", "--out", str(tmp_path / "gpu.json")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no CUDA device" in done.stdout
    assert not (tmp_path / "gpu.json").exists()

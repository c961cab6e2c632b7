"""What a benchmark says of the machine that it ran on."""

import os
import platform
from pathlib import Path


def machine() -> dict[str, object]:
    """Its name, and how busy it was already."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model.partition(": ")[2],
        "cpus": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }

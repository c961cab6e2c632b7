"""What bench_wan cannot do without: looked for before anything is made or measured."""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

LINK_PROGRAMS = {"ip": "iproute2", "sysctl": "procps"}
CHECKPOINT_PROGRAMS = {"nginx": "nginx-light", "curl": "curl", "rsync": "rsync"}
"""Program -> its Debian package."""
ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


def sentence_on_missing(checkpoints: bool, congestion: Iterable[str]) -> str | None:
    """Names all that is missing and how to get it. `checkpoints`: whether whole ones are fetched for comparison."""
    if sys.platform != "linux":
        return "The links are made of Linux network namespaces: run bench_wan on Linux."
    programs = LINK_PROGRAMS | (CHECKPOINT_PROGRAMS if checkpoints else {})
    missing = [
        f"{name} (apt-get install {package})" for name, package in programs.items() if shutil.which(name) is None
    ]
    if os.geteuid():
        missing.append("root, for network namespaces (sudo)")
    if not Path("/dev/net/tun").exists():
        missing.append("/dev/net/tun (modprobe tun; in a container, --device /dev/net/tun)")
    missing += [refused(name) for name in sorted(set(congestion) - set(_allowed()))]
    return f"bench_wan needs what is not here: {'; '.join(missing)}." if missing else None


def refused(congestion: str) -> str:
    """A namespace may use what is allowed on the host only, whether or not the kernel has more."""
    allowed = " ".join([*_allowed(), congestion])
    return (
        f"{congestion} congestion control in namespaces (modprobe tcp_{congestion}; "
        f"sysctl -w net.ipv4.tcp_allowed_congestion_control='{allowed}')"
    )


def _allowed() -> list[str]:
    return ALLOWED.read_text().split() if ALLOWED.exists() else []

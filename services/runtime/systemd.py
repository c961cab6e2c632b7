"""The service manager's protocol (sd_notify(3)), with the standard library alone. Does nothing outside systemd."""

import os
import socket

_SOCKET = "NOTIFY_SOCKET"


def notify(*lines: str) -> None:
    """Sends `KEY=value` lines in one datagram. A service manager that is gone is no reason to fail."""
    path = os.environ.get(_SOCKET, "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    message = "\n".join(line.replace("\n", " ") for line in lines).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            sender.sendto(message, address)
    except OSError:  # nobody listens, or no file can be opened any more
        return


def watchdog_interval_s() -> float | None:
    """Half of WatchdogSec, in seconds; None where no watchdog watches this process."""
    if os.environ.get("WATCHDOG_PID", "") not in ("", str(os.getpid())):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdecimal() and int(microseconds) else None

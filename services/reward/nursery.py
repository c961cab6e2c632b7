"""The nursery: a small process that has imported the algebra system once and forks workers on request.

    pool ──control socket──► nursery ──fork──► worker 1 ◄──its own socket──► pool
         "fork" + descriptor,        └─fork──► worker 2
         "kill"                       reaps them and tells the pool how each one ended

A fork takes milliseconds where importing takes a second, and it is safe because this process has one thread and never
imports grpc. Because the nursery alone reaps, a kill never hits a recycled process id. When the pool's process is gone,
the control socket ends and every worker dies with it.
"""

import ctypes
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import cast

from services.reward.graders import Permissions, build
from services.reward.graders.math_answer import MathOptions
from services.reward.scorer import ScoreRequest
from services.reward.spec import GraderSpec
from services.reward.worker import Limits, serve

CONTROL_BYTES_MAX = 4096
EXIT_MEMORY = 5
_PR_SET_PDEATHSIG = 1
_WARM = (
    ("\\frac{x+1}{2}", "(x+1)/2"),
    ("\\{1,2\\}", "2, 1"),
    ("(1,2]", "(1, 3]"),
    ("x=\\sqrt{8}", "2\\sqrt{2}"),
    ("7", "\\boxed{7}"),
)


def arguments(control: socket.socket, limits: Limits, permissions: Permissions) -> list[str]:
    """The command line of a nursery that serves `control`."""
    settings = {"limits": dataclasses.asdict(limits), "permissions": dataclasses.asdict(permissions)}
    return [sys.executable, "-m", "services.reward.nursery", str(control.fileno()), json.dumps(settings)]


def main(argv: Sequence[str]) -> int:
    """Runs until the control socket ends."""
    control = socket.socket(fileno=int(argv[0]))
    settings = json.loads(argv[1])
    limits = Limits(**settings["limits"])
    allowed = settings["permissions"]
    permissions = Permissions(code=allowed["code"], python=tuple(allowed["python"]))
    # A terminal's Ctrl-C, or its end, goes to every process of the group: the pool decides when workers end.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _warm()
    wake_read, wake_write = socket.socketpair()
    wake_write.setblocking(False)
    wake_read.setblocking(False)
    signal.signal(signal.SIGCHLD, _note_child)
    signal.set_wakeup_fd(wake_write.fileno())
    children: dict[int, int] = {}
    with suppress(OSError):  # the pool has gone meanwhile: the socket's end is read below
        control.send(b"{}")
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if wake_read in ready:
                with suppress(BlockingIOError):
                    wake_read.recv(4096)
                _reap(control, children)
            if control in ready and not _obey(control, children, limits, permissions):
                break
    for pid in children.values():
        os.kill(pid, signal.SIGKILL)
    for pid in children.values():
        os.waitpid(pid, 0)
    return 0


def _note_child(_signal: int, _frame: FrameType | None) -> None:
    """Python writes to the wake-up descriptor only for signals that have a handler."""


def _warm() -> None:
    """Fills the parsers' caches, so that every worker inherits them."""
    grader = build([GraderSpec(name="math", options=MathOptions().model_dump())], Permissions())[0].grader
    for answer, completion in _WARM:
        grader.grade(ScoreRequest(prompt="", answer=answer, completion=f"\\boxed{{{completion}}}"))


def _obey(control: socket.socket, children: dict[int, int], limits: Limits, permissions: Permissions) -> bool:
    """One command of the pool; False at the end of the control socket."""
    try:
        data, descriptors, _, _ = socket.recv_fds(control, CONTROL_BYTES_MAX, 1)
    except ConnectionResetError:
        return False
    if not data:
        return False
    command = cast("dict[str, object]", json.loads(data))
    worker = cast("int", command["worker"])
    if command["do"] == "fork":
        pid = os.fork()
        if pid == 0:
            _become_worker(control, descriptors[0], limits, permissions)
        os.close(descriptors[0])
        children[worker] = pid
    elif worker in children:
        os.kill(children[worker], signal.SIGKILL)
    return True


def _become_worker(control: socket.socket, descriptor: int, limits: Limits, permissions: Permissions) -> None:
    code = 1
    try:
        # Dies with the nursery, whatever happens to the pool.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        code = serve(socket.socket(fileno=descriptor), limits, permissions)
    except OSError:
        code = 4  # the pool is gone
    except MemoryError:
        code = EXIT_MEMORY
    finally:
        os._exit(code)


def _reap(control: socket.socket, children: dict[int, int]) -> None:
    for worker, pid in list(children.items()):
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            del children[worker]
            ended = {
                "worker": worker,
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
                "cpu_s": usage.ru_utime + usage.ru_stime,
            }
            with suppress(OSError):
                control.send(json.dumps(ended).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The process that vLLM runs in: `python -m services.sampler.vllm_child FD`, where FD is its end of a socket pair.

    reader thread: frames ─► inbox ─► main: commands → load when due → step → finished groups ─► frames

vLLM's own continuous batching decides what runs: requests are added as they come, between two steps, and answered as
they finish. The process ends when the parent's end of the socket closes, however that happens.
"""

import logging
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections import deque
from typing import cast

from services.reward import frames
from services.sampler.vllm_child.messages import Command, Refused, Report, Start

_ALIVE_S = 1.0


class Parent:
    """The socket: commands come through a thread of its own, so that a step never waits for one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="parent", daemon=True).start()

    def _read(self) -> None:
        while (message := frames.receive(self._connection)) is not None:
            self._inbox.put(cast("Command", message))
        os._exit(0)  # the parent has gone: nobody waits for what is being generated

    def send(self, report: Report) -> None:
        self._connection.sendall(frames.encode(report))

    def next_command(self, *, wait: bool) -> Command | None:
        """The next one; None when there is none and `wait` is not set."""
        try:
            return self._inbox.get(block=wait)
        except queue.Empty:
            return None


def serve(parent: Parent, start: Start) -> int:
    """Builds the engine and works until told to stop. Returns the exit code."""
    try:
        from services.sampler.vllm_child.generator import Generator

        generator = Generator.build(start)
    except Exception as error:  # the child's end: the parent turns it into one sentence
        parent.send(_refusal(error))
        return 1
    parent.send(generator.ready())
    waiting: deque[Command] = deque()
    alive_at = time.monotonic()
    while True:
        while (command := parent.next_command(wait=not generator.busy and not waiting)) is not None:
            if command["kind"] == "stop":
                return 0
            if command["kind"] == "cancel":
                waiting = deque(item for item in waiting if item.get("id") != command["id"])
                generator.cancel(command["id"])
            else:
                waiting.append(command)
        for report in generator.advance(waiting):
            parent.send(report)
            if report["kind"] == "load_failed":
                return 1
        if time.monotonic() - alive_at > _ALIVE_S:
            parent.send({"kind": "alive"})
            alive_at = time.monotonic()


def _refusal(error: Exception) -> Refused:
    """A ValueError of vLLM's is about a setting, the model or its size; anything else is a fault of the engine."""
    text = " ".join(str(error).split())
    about_settings = isinstance(error, ValueError | ImportError | NotImplementedError | MemoryError | OSError)
    about_settings = about_settings or type(error).__name__ in {"OutOfMemoryError", "ValidationError"}
    return {
        "kind": "refused",
        "fault": "config" if about_settings else "engine",
        "message": f"{type(error).__name__}: {text[:400]}",
    }


def main() -> int:
    os.dup2(2, 1)  # vLLM logs to stdout, which belongs to whoever started the sampler
    # vLLM's tracing would load grpc, whose threads do not survive the forks of tensor-parallel workers.
    sys.modules["grpc"] = None  # pyright: ignore[reportArgumentType]
    # Before it dies, vLLM logs every request with its token ids, by the page.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    parent = Parent(socket.socket(fileno=int(sys.argv[1])))
    start = parent.next_command(wait=True)
    if start is None or start["kind"] != "start":
        return 2
    return serve(parent, start)


if __name__ == "__main__":
    try:
        code = main()
    except Exception:  # the process's end: the parent sees it, and starts another
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # without vLLM's own exit handlers, which can hang on a broken device

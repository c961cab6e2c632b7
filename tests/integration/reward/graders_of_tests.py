"""Graders that the tests call by import path: some fail, hang, or run math-verify without any guard."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def length(prompt: str, completion: str, answer: str, metadata: dict[str, object]) -> float:
    return float(len(completion))


def unguarded(prompt: str, completion: str, answer: str, metadata: dict[str, object]) -> float:
    """What a naive reward function does: math-verify on whatever the policy wrote."""
    from math_verify import parse, verify

    no_timeout: int = None  # type: ignore[assignment]
    gold = parse(f"${answer}$", parsing_timeout=no_timeout)
    return float(verify(gold, parse(f"${completion}$", parsing_timeout=no_timeout), timeout_seconds=no_timeout))


def obey(prompt: str, completion: str, answer: str, metadata: dict[str, object]) -> float:
    """Does what the completion says to the worker that runs it."""
    match completion:
        case "loop":
            while True:
                pass
        case "wait":
            time.sleep(60)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(7)
        case "raise":
            raise RuntimeError("the grader is broken")
        case "crash once":
            mark = Path(str(metadata["mark"]))
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case "odd signal":
            os.kill(os.getpid(), 40)
        case "speak":
            for descriptor in range(3, 64):
                with suppress(OSError):
                    os.write(descriptor, b"\0\0\0\x03[1]")
        case "too much":
            return 1.1e12
        case "fork":
            os.fork()
        case "print":
            print('{"reward": 9}')
        case "recurse":
            return obey(prompt, completion, answer, metadata)
        case "memory":
            held = []
            while True:
                held.append(bytearray(1 << 24))
        case "kernel":
            while True:
                Path("/proc/self/status").read_text()
        case _:
            pass
    return 1.0


def modules(prompt: str, completion: str, answer: str, metadata: dict[str, object]) -> tuple[float, str]:
    import sys

    return 0.0, " ".join(sorted(name for name in ("grpc", "torch", "transformers", "numpy") if name in sys.modules))

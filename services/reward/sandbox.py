"""Runs one program that a policy wrote, in a process under `sandbox_child`, and never waits past its time."""

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.reward.sandbox_child import EXIT_NO_NAMESPACES

OUTPUT_BYTES_MAX = 1 << 20
_CHILD = str(Path(__file__).with_name("sandbox_child.py"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What runs: the program, and after it, in its scope, function calls and statements."""

    source: str
    stdin: str = ""
    calls: Sequence[tuple[str, Sequence[object]]] = ()
    asserts: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """`rlimits_suffice`: run without namespaces where the host does not allow them."""

    cpu_s: int
    wall_s: float
    memory_bytes: int
    rlimits_suffice: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came out. `problem` is None if the program ended by itself with exit code 0."""

    stdout: str
    values: tuple[dict[str, object], ...]
    passed: int
    problem: str | None


class SandboxUnavailableError(RuntimeError):
    """This host cannot isolate: a failure of the grader, not of the answer."""


def run(program: Program, limits: SandboxLimits) -> Outcome:
    """Runs `program`; returns within `wall_s` plus the time to start a process. Raises SandboxUnavailableError."""
    nonce = secrets.token_hex(16)
    job = {
        "program": program.source,
        "calls": [[name, list(arguments)] for name, arguments in program.calls],
        "asserts": list(program.asserts),
        "nonce": nonce,
        "cpu_s": limits.cpu_s,
        "memory_bytes": limits.memory_bytes,
        "rlimits_suffice": limits.rlimits_suffice,
        "interpreter": sys.base_prefix,
    }
    job_file, stdin_file = _memory_file(json.dumps(job).encode()), _memory_file(program.stdin.encode(errors="replace"))
    results_read, results_write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", _CHILD, str(job_file), str(results_write)],
            stdin=stdin_file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[job_file, results_write],
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
    finally:
        for descriptor in (job_file, stdin_file, results_write):
            os.close(descriptor)
    try:
        outputs, cut = _collect(process, results_read, limits.wall_s)
    finally:
        _end(process)
        os.close(results_read)
    stdout, results, stderr = outputs
    if process.returncode == EXIT_NO_NAMESPACES:
        raise SandboxUnavailableError(stderr.decode(errors="replace").strip()[:200])
    values, passed = _results(results, nonce)
    problem = cut or _problem(process.returncode, stderr)
    return Outcome(stdout=stdout.decode(errors="replace"), values=values, passed=passed, problem=problem)


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("sandbox")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _collect(process: subprocess.Popen[bytes], results: int, wall_s: float) -> tuple[list[bytes], str | None]:
    """stdout, results and stderr until all end; and why they were cut off, if they were."""
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + wall_s
    outputs = {process.stdout.fileno(): bytearray(), results: bytearray(), process.stderr.fileno(): bytearray()}
    cut = None
    with selectors.DefaultSelector() as selector:
        for descriptor in outputs:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and cut is None:
            left = deadline - time.monotonic()
            if left <= 0:
                cut = f"no end within {wall_s:.2g} s"
                break
            for key, _ in selector.select(left):
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fd)
                outputs[key.fd] += data
                if len(outputs[key.fd]) > OUTPUT_BYTES_MAX:
                    cut = f"more than {OUTPUT_BYTES_MAX} bytes of output"
    if cut is None:
        # Its pipes are closed; what it still does without them counts against its time too.
        try:
            process.wait(max(0.0, deadline - time.monotonic()) + 0.2)
        except subprocess.TimeoutExpired:
            cut = f"no end within {wall_s:.2g} s"
    return [bytes(one) for one in outputs.values()], cut


def _end(process: subprocess.Popen[bytes]) -> None:
    # Its own session: whatever it started outside a process namespace goes with it.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _results(data: bytes, nonce: str) -> tuple[tuple[dict[str, object], ...], int]:
    values: list[dict[str, object]] = []
    passed = 0
    for line in data.splitlines():
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(result, dict):
            continue
        if result.get("passed") == nonce:
            passed += 1
        else:
            values.append(result)
    return tuple(values), passed


def _problem(code: int, stderr: bytes) -> str | None:
    if code == 0:
        return None
    said = stderr.decode(errors="replace").strip().splitlines()
    if said:
        return said[-1][:200]
    if code == 256 - signal.SIGXCPU or code == 256 - signal.SIGKILL:
        return "over the limit of CPU seconds"
    return f"exit code {code}"

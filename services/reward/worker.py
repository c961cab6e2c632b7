"""One worker: a forked child that grades items from a socket until it is killed. Imports no grpc and no torch.

Its limits kill it from outside Python, because a big power or a regular expression never returns to the interpreter:

    CPU seconds per item   ITIMER_PROF with the default action of SIGPROF: the kernel ends the process
    memory                 RLIMIT_AS: MemoryError, which is reported, and then the worker ends itself
    wall seconds per item  the pool's: SIGKILL through the nursery
"""

import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from services.reward import frames
from services.reward.graders import Permissions, WeightedGrader, build, load
from services.reward.scorer import ScoreRequest
from services.reward.spec import parse_graders_text
from services.runtime.errors import EngineError, ScoreError

REASON_CHARS_MAX = 300
# The kernel prefers to kill a grader when the machine runs out of memory, never the sampler beside it.
OOM_SCORE_ADJUSTMENT = "900"
_OURS = f"{Path(__file__).parents[1]}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one completion may cost. Every value is a bound, none is a target."""

    cpu_s: float = 1.0
    """CPU seconds, user and system."""
    wall_s: float = 1.7
    """Seconds by the clock, for a worker that waits instead of computing."""
    memory_bytes: int = 1 << 30
    """Address space of a worker; the interpreter with its algebra system takes about 0.25 GiB of it."""
    completion_chars: int = 500_000
    """A longer completion has reward 0 and is not graded."""
    items_per_worker: int = 5_000
    """Completions after which a worker is replaced, because parsers keep caches that only grow."""


def serve(connection: socket.socket, limits: Limits, permissions: Permissions) -> int:
    """Grades until the pool closes the socket or an item fails; returns the exit code."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as oom:
        oom.write(OOM_SCORE_ADJUSTMENT)

    @lru_cache(maxsize=16)
    def load_once(graders: str) -> tuple[WeightedGrader, ...]:
        built = build(parse_graders_text(graders), permissions)
        load(built)
        return built

    pid = os.getpid()
    while True:
        message = frames.receive(connection)
        if message is None:
            return 0
        job = cast("Mapping[str, object]", message)
        graders, loaded = _loaded(load_once, cast("str", job["graders"]))
        connection.sendall(frames.encode({**loaded, "cpu_s": time.process_time()}))
        if graders is None:
            return 3
        cpu_s = limits.cpu_s + sum(one.extra_s for one in graders)
        for item in cast("Sequence[Mapping[str, object]]", job["items"]):
            # The interval ends a process that outlives the first signal, which none should.
            signal.setitimer(signal.ITIMER_PROF, cpu_s, cpu_s)
            reply = _grade(graders, item)
            if os.getpid() != pid:
                os._exit(0)  # a child that a grader forked: it has this socket, and nothing to say on it
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            connection.sendall(frames.encode({**reply, "cpu_s": time.process_time()}))
            if reply["kind"] in ("failed", "memory"):
                return 3


def _loaded(
    load_once: Callable[[str], tuple[WeightedGrader, ...]], graders: str
) -> tuple[tuple[WeightedGrader, ...] | None, dict[str, object]]:
    """The graders, if their modules can be imported here, and what the pool is told."""
    try:
        return load_once(graders), {"kind": "ready"}
    except EngineError as error:
        reason = str(error)
    except MemoryError:
        reason = "a grader's module needs more memory than a worker may take (--memory-bytes)"
    except Exception as error:  # the end of this process: whatever a module raises becomes data for the pool
        reason = f"a grader's module raised {error!r:.200}"
    return None, {"kind": "unloadable", "reason": reason}


def _grade(graders: Sequence[WeightedGrader], item: Mapping[str, object]) -> dict[str, object]:
    request = ScoreRequest(
        prompt=cast("str", item["prompt"]),
        answer=cast("str", item["answer"]),
        completion=cast("str", item["completion"]),
        metadata=cast("Mapping[str, object]", item["metadata"]),
    )
    started = time.perf_counter()
    parts: list[dict[str, object]] = []
    name = ""
    try:
        for weighted in graders:
            name = weighted.name
            verdict = weighted.grader.grade(request)
            parts.append(
                {
                    "grader": name,
                    "reward": verdict.reward,
                    "weight": weighted.weight,
                    "extracted": verdict.extracted,
                    "reason": verdict.reason[:REASON_CHARS_MAX],
                }
            )
    except ScoreError as error:
        return {"kind": "unusable", "reason": str(error)}
    except MemoryError:
        return {"kind": "memory"}
    except RecursionError:
        # Text that no parser can hold is a wrong answer; the reference answer has been parsed before it.
        parts.append(
            {"grader": name, "reward": 0.0, "weight": 0.0, "extracted": None, "reason": "nested too deeply to be read"}
        )
    except Exception as error:  # the end of this process: whatever a grader raises becomes data for the pool
        return {"kind": "failed", "reason": f"the grader {name} raised {error!r:.200}{_place(error)}"}
    return {"kind": "ok", "parts": parts, "seconds": time.perf_counter() - started}


def _place(error: Exception) -> str:
    """Where an operator's function, or a library, failed: its author sees no traceback. Empty for our own code."""
    places: list[tuple[str, int]] = []
    step = error.__traceback__
    while step is not None:
        places.append((step.tb_frame.f_code.co_filename, step.tb_lineno))
        step = step.tb_next
    others = [(path, line) for path, line in places if not path.startswith(_OURS)]
    return next((f" ({Path(path).name}, line {line})" for path, line in reversed(others) if path == others[0][0]), "")

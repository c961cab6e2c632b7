"""Failpoints: named places where a test can stop, delay or kill the process.

    HETERORL_FAILPOINTS="journal.after_commit=3*off->kill; spool.write=error(StorageError)"

Each point has a list of terms, joined by `->`; `N*` lets a term act N times, the last without it acts for ever.

    off          pass
    kill         SIGKILL to this process: nothing is flushed, nothing is cleaned up
    error        raise StorageError; error(NAME) another class of services.runtime.errors
    delay(MS)    block this thread for MS milliseconds
"""

import os
import re
import signal
import threading
import time
from dataclasses import dataclass, field

from services.runtime import errors
from services.runtime.errors import ConfigError, HeteroRLError

VARIABLE = "HETERORL_FAILPOINTS"
_TERM = re.compile(r"(?:(\d+)\*)?(off|kill|error|delay)(?:\(([^)]*)\))?")


@dataclass(slots=True, kw_only=True)
class _Term:
    action: str
    argument: str
    left: int | None
    """Times it still acts; None is for ever."""


@dataclass(slots=True, kw_only=True)
class _Point:
    terms: list[_Term]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_term(self) -> _Term | None:
        with self.lock:
            for term in self.terms:
                if term.left is None:
                    return term
                if term.left > 0:
                    term.left -= 1
                    return term
        return None


_points: dict[str, _Point] | None = None if os.environ.get(VARIABLE) else {}
"""None until the variable is read, at the first hit or by `arm`: importing must not raise."""


def hit(name: str) -> None:
    """Passes the failpoint `name`; does nothing unless it is armed. Costs one comparison when none is."""
    if _points is None:
        arm_from_environment()
    if _points and name in _points:
        _act(name, _points[name])


def arm_from_environment() -> None:
    """What HETERORL_FAILPOINTS says, now: a process calls it at its start, so that a wrong text ends it there."""
    arm(os.environ.get(VARIABLE, ""))


def arm(text: str) -> None:
    """Replaces all armed failpoints; "" disarms. Raises ConfigError for a text that is not of the form above."""
    global _points
    _points = dict(_parse(part.strip()) for part in text.split(";") if part.strip())


def _parse(text: str) -> tuple[str, _Point]:
    name, equals, actions = text.partition("=")
    terms = [_parse_term(text, word.strip()) for word in actions.split("->")] if equals else []
    if not terms or not name.strip():
        raise ConfigError(f"{VARIABLE}: {text!r} is not of the form name=action or name=3*off->kill")
    return name.strip(), _Point(terms=terms)


def _parse_term(text: str, word: str) -> _Term:
    match = _TERM.fullmatch(word)
    if match is None:
        raise ConfigError(f"{VARIABLE}: {word!r} in {text!r} is none of off, kill, error, error(NAME), delay(MS)")
    count, action, argument = match[1], match[2], match[3] or ""
    if action == "delay" and not argument.isdecimal():
        raise ConfigError(f"{VARIABLE}: {word!r} in {text!r} needs milliseconds, as in delay(50)")
    if action == "error" and argument:
        _error_class(argument)
    return _Term(action=action, argument=argument, left=int(count) if count else None)


def _error_class(name: str) -> type[HeteroRLError]:
    found: object = getattr(errors, name or "StorageError", None)
    if not (isinstance(found, type) and issubclass(found, HeteroRLError)):
        raise ConfigError(f"{VARIABLE}: error({name}) names no class of services.runtime.errors")
    return found


def _act(name: str, point: _Point) -> None:
    term = point.next_term()
    match term.action if term else "off":
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "error":
            raise _error_class(term.argument if term else "")(f"failpoint {name}: a fault made on purpose")
        case "delay":
            time.sleep(int(term.argument if term else "0") / 1000)
        case _:
            pass

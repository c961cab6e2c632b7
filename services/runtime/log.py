"""Structured logging: an event name and its facts, one JSON line each; a readable line on a terminal.

    log = get_logger("learner.publisher")
    log.info("version_published", version=12, bytes=40960)

Values of keys that name a secret, and anything that looks like a private key, never reach the output.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO, cast

from services.runtime.config import Section

_FACTS = "heterorl_facts"
_SECRET_KEY = re.compile(r"(^|_)(secret|password|passwd|token|authorization|credential|private_key|key_pem)$")
_SECRET_VALUE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_REDACTED = "(secret)"
_MOST_CHARACTERS = 4000
"""A hostile peer can put text of its own into an event: one line stays bounded."""


class LogSection(Section):
    """What a process writes to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe event that is written."""
    format: Literal["auto", "json", "text"] = "auto"
    """One JSON object per line, or text for people; auto is text on a terminal and JSON elsewhere."""


class Logger:
    """Writes events of one part of the process. Cheap when the level is off."""

    __slots__ = ("_bound", "_logger")

    def __init__(self, logger: logging.Logger, bound: Mapping[str, object]) -> None:
        self._logger = logger
        self._bound = bound

    def bind(self, **facts: object) -> "Logger":
        """A logger whose every event carries these facts too."""
        return Logger(self._logger, {**self._bound, **facts})

    def debug(self, event: str, **facts: object) -> None:
        self._write(logging.DEBUG, event, facts, None)

    def info(self, event: str, **facts: object) -> None:
        self._write(logging.INFO, event, facts, None)

    def warning(self, event: str, **facts: object) -> None:
        self._write(logging.WARNING, event, facts, None)

    def error(self, event: str, *, exc_info: BaseException | None = None, **facts: object) -> None:
        """`exc_info` adds the traceback: for faults of ours, not for expected outcomes."""
        self._write(logging.ERROR, event, facts, exc_info)

    def _write(self, level: int, event: str, facts: Mapping[str, object], error: BaseException | None) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={_FACTS: {**self._bound, **facts}}, exc_info=error)


def get_logger(name: str) -> Logger:
    """The logger of one part, named like "sampler.follower"."""
    return Logger(logging.getLogger(f"heterorl.{name}"), {})


def configure(settings: LogSection, stream: TextIO | None = None) -> None:
    """Sends the process's events, and warnings of its libraries, to `stream` (stderr). Called once, by the main."""
    out = sys.stderr if stream is None else stream
    as_json = settings.format == "json" or (settings.format == "auto" and not out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines() if as_json else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("heterorl").setLevel(settings.level.upper())


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "event", facts…}: one object, one line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("heterorl."),
            "event": record.getMessage()[:_MOST_CHARACTERS],
        }
        for key, value in _facts(record).items():
            line[f"{key}_" if key in line else key] = _plain(key, value)
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))[-4 * _MOST_CHARACTERS :]
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """12:30:01 INFO learner.publisher version_published version=12 bytes=40960."""

    def format(self, record: logging.LogRecord) -> str:
        words = [f"{_time(record).astimezone():%H:%M:%S}", record.levelname, record.name.removeprefix("heterorl.")]
        words.append(_printable(record.getMessage()[:_MOST_CHARACTERS]))
        for key, value in _facts(record).items():
            plain = _plain(key, value)
            text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=str)
            words.append(f"{key}={_printable(text)}")
        line = " ".join(words)
        if record.exc_info and record.exc_info[1]:
            line += "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
        return line


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _facts(record: logging.LogRecord) -> Mapping[str, object]:
    return cast(Mapping[str, object], record.__dict__.get(_FACTS, {}))


def _plain(key: str, value: object) -> object:
    """The value as JSON can hold it, without secrets, and bounded."""
    if _SECRET_KEY.search(key):
        return _REDACTED
    match value:
        case None | bool() | int() | float():
            return value
        case bytes():
            return value[:64].hex()
        case Mapping():
            items = cast(Mapping[object, object], value).items()
            return {str(name): _plain(str(name), item) for name, item in items}
        case list() | tuple() | set() | frozenset():
            return [_plain("", item) for item in cast(list[object], value)]
        case _:
            text = str(value)
    if _SECRET_VALUE.search(text):
        return _REDACTED
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "…"


def _printable(text: str) -> str:
    """Quoted where it holds spaces or control characters: nobody forges a line, or colours a terminal."""
    return text if text.isprintable() and " " not in text else json.dumps(text)

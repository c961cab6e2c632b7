"""Log lines: one per event, nothing forged, nothing secret."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from services.runtime.log import LogSection, configure, get_logger


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("heterorl").setLevel(logging.NOTSET)


def test_an_event_is_one_json_object_with_its_facts(out: io.StringIO):
    configure(LogSection(format="json"), out)
    get_logger("learner.publisher").bind(run="r1").info("published", version=12, path=Path("/x"), root=b"\x01\xff")
    line = json.loads(out.getvalue())
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "info",
        "logger": "learner.publisher",
        "event": "published",
        "run": "r1",
        "version": 12,
        "path": "/x",
        "root": "01ff",
    }


def test_events_below_the_level_are_not_written(out: io.StringIO):
    configure(LogSection(format="json", level="warning"), out)
    get_logger("a").info("quiet")
    get_logger("a").warning("loud")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["loud"]


@pytest.mark.parametrize("style", ["json", "text"])
def test_secrets_never_reach_the_output(out: io.StringIO, style: str):
    configure(LogSection(format=style), out)
    pem = "-----BEGIN PRIVATE KEY-----\nhunter2\n"
    get_logger("a").info("x", enrolment_token="hunter2", headers={"authorization": "hunter2"}, note=pem, tokens=3)
    assert "hunter2" not in out.getvalue()
    assert "(secret)" in out.getvalue()
    assert "3" in out.getvalue()


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_value_cannot_forge_a_line_or_colour_a_terminal(out: io.StringIO, style: str):
    configure(LogSection(format=style), out)
    get_logger("a").info("x", reason="one\n12:00:00 ERROR a forged\x1b[31m")
    assert len(out.getvalue().splitlines()) == 1
    assert "\x1b" not in out.getvalue()


def test_a_hostile_value_is_cut(out: io.StringIO):
    configure(LogSection(format="json"), out)
    get_logger("a").info("x", reason="a" * 10**6)
    assert len(out.getvalue()) < 5000


def test_a_fault_carries_its_traceback_in_the_same_line(out: io.StringIO):
    configure(LogSection(format="json"), out)
    try:
        raise KeyError("k")
    except KeyError as error:
        get_logger("a").error("fault", exc_info=error)
    line = json.loads(out.getvalue())
    assert "KeyError: 'k'" in line["traceback"]
    assert "test_log.py" in line["traceback"]


def test_a_terminal_gets_readable_text(out: io.StringIO):
    configure(LogSection(format="text"), out)
    get_logger("sampler").warning("learner_absent", next_try_s=1.5, reason="connection refused")
    assert out.getvalue().endswith(' WARNING sampler learner_absent next_try_s=1.5 reason="connection refused"\n')


def test_auto_is_json_where_there_is_no_terminal(out: io.StringIO):
    configure(LogSection(), out)
    get_logger("a").info("x")
    assert json.loads(out.getvalue())["event"] == "x"


def test_a_fact_cannot_replace_the_fields_of_the_line(out: io.StringIO):
    configure(LogSection(format="json"), out)
    get_logger("a").bind(level="fake").info("x")
    assert json.loads(out.getvalue())["level"] == "info"

"""What the guard refuses before any algebra runs, and what it must let through."""

import time

import pytest

from services.reward.graders.extract import boxes, clean, hash_answer, phrase_answer
from services.reward.graders.guard import balanced, too_big
from services.reward.graders.numerals import numbers
from services.reward.graders.quantity import read_quantity
from services.reward.graders.units import is_unit
from services.reward.worker import Limits


@pytest.mark.parametrize(
    "text",
    [
        "10^10^10",
        "10^{10^{10}}",
        "9**9**9",
        "2^{99999}",
        "(10^9)!",
        "(10**9)!",
        "99999!",
        "5!!",
        "3!!",
        "1" * 401,
        "(" * 25 + ")" * 25,
        "x" * 1001,
        "\\sum_{k=1}^{9} k",
        "\\binom{10^6}{3}",
        "\\binom{100000}{3}",
        "(9\\cdot 9)!",
    ],
    ids=lambda text: text[:20],
)
def test_what_has_no_bound_is_refused(text: str) -> None:
    assert too_big(text) is not None


@pytest.mark.parametrize(
    "text",
    ["2^{100}", "x^2", "x^{n+1}", "10!", "\\binom{10}{3}", "e^{x^2}", "\\frac{1}{1+\\frac{1}{x}}", "2^{10}+3^{10}"],
)
def test_what_an_answer_may_look_like_is_let_through(text: str) -> None:
    assert too_big(text) is None


@pytest.mark.parametrize(
    ("text", "expected"), [("{}", True), ("}{", False), ("\\{", True), ("{\\}", False), ("{{}", False)]
)
def test_brackets_are_counted_without_the_escaped_ones(text: str, expected: bool) -> None:
    assert balanced(text) is expected


@pytest.mark.parametrize(
    "piece",
    [
        "\\boxed{",
        "\\boxed{}",
        "####",
        "answer is ",
        "answer: ",
        "1,",
        "1 ",
        "$",
        "a",
        "\\left",
        "1/",
        "-",
        "\\text{",
        "**",
    ],
)
def test_extraction_is_fast_on_long_repetitions(piece: str) -> None:
    text = piece * (Limits().completion_chars // len(piece))
    started = time.process_time()
    boxes(text), hash_answer(text), phrase_answer(text), numbers(text), clean(text), read_quantity(clean(text))
    is_unit(text[:400] + "!", glued=True)
    # Linear scans take milliseconds; anything that backtracks takes minutes, and the test's time limit ends it.
    assert time.process_time() - started < 20

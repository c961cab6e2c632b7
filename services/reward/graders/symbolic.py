"""Equality of expressions, intervals, sets, equations and matrices by math-verify, without its known wrong answers.

math-verify 0.9 accepts each of these pairs (gold, answer); they are refused here:

    1/3, 0.333333         rounds floats to six places        -> floats become exact rationals first
    5, 9=5                takes the right side of any chain   -> every numeric side must equal the answer
    3, "1 2"              reads two numbers as a mixed one    -> numbers side by side are no answer
    101_3, 101_2          drops the base                      -> bases are compared
    (1,2), \\{1,2\\}        open interval and set of two        -> kinds of brackets are compared
    2, 2c                 strips "c", "t", "h" as units       -> its unit table is off, ours is `units`
    7, "7}{"              repairs brackets                    -> unbalanced text is no answer
    x, X                  folds case                          -> single letters are compared exactly

Its time-outs use SIGALRM and are off: the worker's limits and the pool's kill bound the time.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from services.reward.graders.guard import ITERATED, balanced, too_big
from services.reward.graders.units import agree, is_unit, unit_words

if TYPE_CHECKING:
    from sympy import Basic

_EQUALS = re.compile(r"(?<![\\<>!:=~])=(?!=)")
_NUMBERS_SIDE_BY_SIDE = re.compile(r"(?<![_^\d.])\d+\s+\d+(?!\s*/|\d)(?![^{]*\})")
_BASE = re.compile(r"(?P<digits>[0-9A-Fa-f]+)_\{?\s*(?P<base>\d{1,2}|\\text\{\w+\})\s*\}?")
_TRAILING_UNIT = re.compile(
    r"(?P<unit>(?:\\(?:text|mathrm|mbox|textbf|textrm)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?|\^\{?\\circ\}?|°"
    r"|\s[A-Za-z]{2,}(?:\^\{?[23]\}?)?)\s*)$"
)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{\s*([^{}]*?)\s*\}")
_NUMERIC_SIDE = re.compile(r"(?:[\d\s.,+*/()^{}\-]|\\(?:frac|sqrt|cdot|times|pi|div))+")
_LISTED = re.compile(r"[,;]|\b(?:or|and)\b|\\(?:vee|lor|wedge|land|quad|qquad)(?![A-Za-z])|\\\\")
_PRIME_OF_NUMBER = re.compile(r"\d\s*['\"]")
_RATIO = re.compile(r"(\d{1,2}):(\d{2})(?::\d{2})?(?!\d)")
_NAMED = re.compile(r"([A-Za-z])(?:_\{?\w+\}?)?\s*=(?!=)")  # x of "x_1 = 3"
_CONNECTIVE = re.compile(r"\b(?:or|and)\b")
_OPENINGS, _CLOSINGS = "([{", ")]}"

logging.getLogger("math_verify").setLevel(logging.ERROR)


def same_expression(gold: str, answer: str) -> str | None:
    """None if cleaned `answer` is equal to cleaned `gold`, else why not. `gold` must pass `why_unparsable`."""
    answer = _unnamed(gold, answer)
    if _squeezed(_unwrapped(gold)) == _squeezed(_unwrapped(answer)):
        return None
    reason = _malformed(answer)
    if reason is not None:
        return reason
    if len(gold) == 1 and len(answer) == 1:
        return "another symbol than the reference answer"
    gold, gold_unit = _without_unit(gold)
    answer, answer_unit = _without_unit(answer)
    if not agree(gold_unit, answer_unit):
        return "another unit than the reference answer"
    gold_base, answer_base = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if gold_base or answer_base:
        return _same_in_base(gold_base, answer_base, gold, answer)
    if _RATIO.match(gold):
        # A time of day, perhaps: 3:45 and 6:90 are equal as ratios only.
        return None if _squeezed(gold) == _squeezed(answer) else "another time or ratio than the reference answer"
    if not _brackets_agree(gold, answer):
        return "another kind of bracket than the reference answer"
    answer = answer.split("\\approx")[0].strip()
    if (
        len(_EQUALS.findall(answer)) > 1
        and _LISTED.search(answer)
        and not (_LISTED.search(gold) or _kind(gold) or ("\\pm" in gold and len(set(_NAMED.findall(answer))) == 1))
    ):
        return "several values where one is asked"
    for side in _sides(gold, answer):
        if not _verified(gold, side):
            return "not equal to the reference answer"
    return None


def why_unparsable(gold: str) -> str | None:
    """Why a cleaned reference answer cannot be compared with anything, or None."""
    reason = _malformed(gold)
    if reason is None and _BASE.fullmatch(gold) is None and _parsed(_without_unit(gold)[0]) is None:
        reason = "it is not an expression that can be read"
    return reason


def approximate(gold: str) -> Fraction | None:
    """The value of a cleaned reference answer such as "2\\sqrt{3}" to 30 digits; None if it is no real number."""
    from sympy import Expr

    value = _parsed(_without_unit(gold)[0])
    if not isinstance(value, Expr) or not (value.is_number and value.is_extended_real and value.is_finite):
        return None
    return Fraction(str(value.evalf(30)))


def _malformed(text: str) -> str | None:
    if "\\boxed" in text or "\\fbox" in text:
        return "a box inside of the answer"
    if not balanced(text):
        return "its brackets do not pair up"
    if _NUMBERS_SIDE_BY_SIDE.search(text) and not _CONNECTIVE.search(text) and "matrix" not in text:
        return "two numbers side by side"
    if _PRIME_OF_NUMBER.search(text):
        return "a prime behind a number"
    return too_big(text)


def _squeezed(text: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _unwrapped(text: str) -> str:
    wrapped = _TEXT.fullmatch(text)
    return wrapped[1] if wrapped is not None else text


def _unnamed(gold: str, answer: str) -> str:
    """ "7" of "\\lim_{x \\to 0} f(x) = 7": what names the value need not be computed."""
    name, equals, value = answer.rpartition("=")
    bounds = re.sub(r"_\{[^{}]*\}", "", name)
    named = equals and "=" not in bounds + gold and ITERATED.search(name) and not _LISTED.search(value)
    return value.strip() if named else answer


def _without_unit(text: str) -> tuple[str, frozenset[str]]:
    match = _TRAILING_UNIT.search(text)
    if match is None or match.start() == 0:
        return text, frozenset()
    unit = match["unit"]
    head = text[: match.start()].rstrip()
    # A word after a bracket or an operator belongs to the expression.
    if not is_unit(unit, glued=not unit[0].isspace()) or head[-1:] in "+-*/=<>(,{[^_" or not re.search(r"\d|\\", head):
        return text, frozenset()
    return head, unit_words(unit)


def _same_in_base(
    gold: re.Match[str] | None, answer: re.Match[str] | None, gold_text: str, answer_text: str
) -> str | None:
    # A base that only one side states is ignored, like a unit.
    gold_digits = gold["digits"] if gold else _squeezed(gold_text)
    answer_digits = answer["digits"] if answer else _squeezed(answer_text)
    if gold and answer and gold["base"] != answer["base"]:
        return "another base than the reference answer"
    return None if gold_digits.upper() == answer_digits.upper() else "not equal to the reference answer"


def _kind(text: str) -> str:
    """The outermost pair of brackets around a list, "()" for example; "" without one."""
    plain = text.replace("\\{", "{").replace("\\}", "}").strip()
    if len(plain) < 2 or plain[0] not in _OPENINGS or plain[-1] not in _CLOSINGS:
        return ""
    depth = 0
    listed = False
    for index, character in enumerate(plain):
        depth += (character in _OPENINGS) - (character in _CLOSINGS)
        listed = listed or (character == "," and depth == 1)
        if depth == 0 and index < len(plain) - 1:
            return ""
    return plain[0] + plain[-1] if listed else ""


def _brackets_agree(gold: str, answer: str) -> bool:
    gold_kind, answer_kind = _kind(gold), _kind(answer)
    # A list without brackets is read as the reference answer is written; {..} never equals (..).
    return not gold_kind or not answer_kind or gold_kind == answer_kind or {gold_kind, answer_kind} == {"()", "[]"}


def _sides(gold: str, answer: str) -> list[str]:
    """The parts of `answer` that must each equal `gold`: one, unless it is a chain of equations and gold is not."""
    parts = [part.strip() for part in _EQUALS.split(answer)]
    if len(parts) == 1 or _EQUALS.search(gold) or _kind(answer) or _LISTED.search(answer):
        return [answer]
    # "A = ..." may name what it computes; everything behind the first equals sign is stated as the value.
    named = _NUMERIC_SIDE.fullmatch(parts[0]) is None
    return parts[named:]


@lru_cache(maxsize=512)
def _parsed(text: str) -> "Basic | None":
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normal = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal)
    # Its annotation says int, its documentation and code say None for "no time-out".
    no_timeout = cast("int", None)
    parsed = parse(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=no_timeout)
    found = cast("list[object]", parsed)
    return _exact(found[0]) if found else None


def _exact(value: object) -> "Basic | None":
    """The parsed value with every float as the rational number that its digits say."""
    from sympy import Basic, Float, MatrixBase, Rational

    if isinstance(value, MatrixBase):
        return cast("Basic", value.applyfunc(_exact))
    if not isinstance(value, Basic):
        return None
    return value.xreplace({one: Rational(str(one)) for one in value.atoms(Float)})


def _verified(gold: str, answer: str) -> bool:
    from math_verify import verify

    gold_value, answer_value = _parsed(gold), _parsed(answer)
    if gold_value is None or answer_value is None:
        return False
    if _kind(gold) in ("()", "[]") and _kind(gold) != _kind(answer) and _kind(answer) and not _is_point(answer_value):
        return False
    return bool(verify(gold_value, answer_value, timeout_seconds=None, allow_set_relation_comp=True))


def _is_point(value: "Basic") -> bool:
    from sympy import Tuple

    return isinstance(value, Tuple)

"""Plain quantities: a rational number with a unit, read without a computer algebra system.

Most answers of grade-school data sets are quantities; comparing two of them as fractions is exact, takes microseconds
and cannot hang. What is no plain quantity (2x, sqrt(2), (1,2)) is None here and goes to `symbolic`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from services.reward.graders.units import PERCENT, SCALES, agree, is_unit, unit_words

QUANTITY_CHARS_MAX = 400

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
_REPEATING = r"\\overline\{?\s*(?P<repeat>\d+)\s*\}?"
_DECIMAL = rf"(?P<whole>{_DIGITS})?(?:\.(?P<fraction>\d*)(?:{_REPEATING})?)?"
_FRAC = r"\\frac\s*(?:\{\s*(?P<n1>-?\d+)\s*\}|(?P<n2>\d))\s*(?:\{\s*(?P<d1>\d+)\s*\}|(?P<d2>\d))"
_SLASH = r"(?P<n3>\d+)\s*/\s*(?P<d3>\d+)"
_POWER = (
    r"(?:[eE](?P<e1>[-+]?\d{1,3})|\s*(?:\\times|\\cdot|×|·|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<e2>[-+]?\d{1,3})\s*\}?)"
)
_CURRENCY = r"(?P<currency>\\?[$]|[€£¥₹])"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:{_CURRENCY}\s*)?(?P<sign2>[-+]?)\s*"
    rf"(?:(?:(?P<mixed>\d+)\s*)?{_FRAC}|(?:(?P<mixed2>\d+)\s+)?{_SLASH}|{_DECIMAL}{_POWER}?)"
    r"(?P<unit>.*)",
    re.DOTALL,
)
_WRAPPED_SCALE = re.compile(
    rf"\s*\\(?:text|mathrm|mbox|textrm)\s*\{{\s*((?:{'|'.join(SCALES)})\b[^{{}}]*)\}}(.*)", re.IGNORECASE | re.DOTALL
)
_CURRENCIES = {"€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """`units` are canonical unit words; empty for a bare number."""

    value: Fraction
    units: frozenset[str]


def read_quantity(text: str) -> Quantity | None:
    """Reads cleaned text (`extract.clean`) as one quantity; None if it is anything else."""
    if len(text) > QUANTITY_CHARS_MAX:
        return None
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or (match["sign"] and match["sign2"]):
        return None
    value = _value(match)
    if value is None:
        return None
    suffix, scale = _split_scale(match["unit"])
    if suffix and not is_unit(suffix, glued=not match["unit"][:1].isspace()):
        return None
    units = unit_words(suffix)
    if match["currency"]:
        units |= {_CURRENCIES.get(match["currency"], "dollar")}
    negative = "-" in (match["sign"], match["sign2"])
    return Quantity(value=(-value if negative else value) * scale, units=units)


def _value(match: re.Match[str]) -> Fraction | None:
    numerator = match["n1"] or match["n2"] or match["n3"]
    if numerator:
        denominator = int(match["d1"] or match["d2"] or match["d3"])
        whole = match["mixed"] or match["mixed2"]
        if not denominator or (whole and int(numerator) < 0):
            return None
        return int(whole or 0) + Fraction(int(numerator), denominator)
    whole, fraction, repeat = match["whole"], match["fraction"] or "", match["repeat"]
    if not whole and not fraction and not repeat:
        return None
    digits = (whole or "0").replace(",", "").replace(" ", "")
    value = Fraction(int(digits + fraction), 10 ** len(fraction))
    if repeat:
        value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10 ** len(fraction))
    return value * Fraction(10) ** int(match["e1"] or match["e2"] or 0)


def _split_scale(suffix: str) -> tuple[str, int]:
    """ "million km" is (" km", 10**6), in \\text or not; several scales multiply."""
    wrapped = _WRAPPED_SCALE.fullmatch(suffix)
    if wrapped is not None:
        suffix = f" {wrapped[1]} {wrapped[2]}"
    scale = 1
    while (words := suffix.split(maxsplit=1)) and words[0].lower() in SCALES:
        suffix = suffix.replace(words[0], "", 1)
        scale *= SCALES[words[0].lower()]
    return suffix, scale


def same_quantity(gold: Quantity, answer: Quantity, *, tolerance: float, percent_as_unit: bool) -> str | None:
    """None if `answer` equals `gold`, else why not.

    A unit that only one side states is ignored; units that contradict each other are an error. `tolerance` is relative
    to gold. With `percent_as_unit` a percent sign may be left out or added, so 50% equals 50 as well as 0.5.
    """
    gold_percent, answer_percent = PERCENT in gold.units, PERCENT in answer.units
    gold_units, answer_units = gold.units - {PERCENT}, answer.units - {PERCENT}
    if (gold_percent and answer_units) or (answer_percent and gold_units):
        return "another unit than the reference answer"
    if not agree(gold_units, answer_units):
        return "another unit than the reference answer"
    golds = {gold.value / 100 if gold_percent else gold.value}
    answers = {answer.value / 100 if answer_percent else answer.value}
    if percent_as_unit and gold_percent != answer_percent:
        golds, answers = golds | {gold.value}, answers | {answer.value}
        if not gold_percent:
            golds = {gold.value}
        else:
            answers = {answer.value}
    if any(close(one, other, tolerance) for one in golds for other in answers):
        return None
    return "not equal to the reference answer"


def close(gold: Fraction, answer: Fraction, tolerance: float) -> bool:
    """Whether the difference is at most `tolerance`, relative to `gold` unless that is 0."""
    return gold == answer or abs(gold - answer) <= Fraction(tolerance) * (abs(gold) or 1)

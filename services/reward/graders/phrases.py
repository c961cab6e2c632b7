"""What a phrase such as "the answer is that she sold $18$ clips" states: one value, or nothing to verify."""

import re

from services.reward.graders.extract import clean, formulas
from services.reward.graders.numerals import numbers
from services.reward.graders.quantity import read_quantity

# The left side of "9 * 2 = 18 dollars".
_SUM = re.compile(r"(?:[\d\s.,+*/()=$-]|\\(?:times|cdot|div))+")
_LONG_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")
NEGATION = re.compile(r"\b(?:not|never|neither|no longer|isn't|wasn't|cannot)\b", re.IGNORECASE)
# Behind a number: another number follows, or the number is only a part of what is stated.
_GOES_ON = re.compile(
    r"\s*(?:or|and|to|through|plus|minus|times|divided|squared|cubed|factorial|mod|(?:less|more|fewer|greater) than)\b",
    re.IGNORECASE,
)
# Behind a number: it is computed with, as in "3 apples + 4 pears = 7".
_COMPUTES = re.compile(r"[A-Za-z\s]*(?:[-+*/]|\\(?:times|cdot|div))[\s($]*\d")
# Before a number: a bound, or a part or a multiple of it.
_NOT_ITSELF = re.compile(
    r"\b(?:than|over|under|above|below|least|most|within|half|third|quarter|twice|thrice|double|triple|times|squared?|cubed?"
    r"|roots?)\b",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"^(?:minus|negative)\s+(?=[\d.$\\])", re.IGNORECASE)


def within(phrase: str, *, number_wanted: bool, may_reason: bool = False) -> str:
    """The part of `phrase` that is compared; the whole phrase, which then equals nothing, if it states no single value.

    A formula counts before a number, and a number at the start before one in the middle. "not 5", "4 or 5",
    "at least 5", "twice 5", "5 squared" and "between 4 and 5" state no value; several formulas are a list. Where the
    phrase `may_reason`, the first of several numbers is what is stated only if it is the last too.
    """
    found = formulas(phrase)
    if found:
        before = phrase.split(found[0], 1)[0]
        doubtful = NEGATION.search(before) or (may_reason and _numbers_beside(phrase, found))
        return phrase if doubtful else ", ".join(found)
    cleaned = _NEGATIVE.sub("-", clean(phrase))
    if cleaned.startswith("-") and read_quantity(cleaned) is not None:
        return cleaned
    if not number_wanted or read_quantity(cleaned) is not None or _LONG_WORD.search(cleaned) is None:
        return phrase
    left, equals, right = cleaned.rpartition("=")
    if equals and _SUM.fullmatch(left) and read_quantity(right.strip()) is not None:
        stated = numbers(right)
        return f"{left.replace('$', '')} = {stated[0]}" if len(stated) == 1 else phrase
    stated = numbers(cleaned)
    if not stated:
        return phrase
    before, _, behind = cleaned.partition(stated[0].lstrip("-"))
    if NEGATION.search(before) or _NOT_ITSELF.search(before) or _GOES_ON.match(behind):
        return phrase
    if len(set(stated)) == 1:
        return stated[0]
    if not cleaned.lstrip("$").startswith(stated[0]):
        return phrase
    # A list of several equals no single value, which the right side of an equation in the phrase might.
    doubtful = (may_reason or _COMPUTES.match(behind)) and stated[0] != stated[-1]
    return ", ".join(stated) if doubtful else stated[0]


def _numbers_beside(phrase: str, found: list[str]) -> bool:
    """Whether other numbers stand beside the formulas."""
    beside = phrase
    for formula in found:
        beside = beside.replace(formula, "", 1)
    return bool(numbers(beside)) and len(set(numbers(phrase))) > 1

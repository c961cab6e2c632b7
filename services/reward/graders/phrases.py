"""What a phrase such as "the answer is that she sold $18$ clips" states: one value, or nothing to verify."""

import re

from services.reward.graders.extract import clean, formulas
from services.reward.graders.numerals import numbers
from services.reward.graders.quantity import read_quantity

# The left side of "9 * 2 = 18 dollars".
_SUM = re.compile(r"(?:[\d\s.,+*/()=$-]|\\(?:times|cdot|div))+")
_LONG_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")
_NEGATION = re.compile(r"\b(?:not|never|neither|no longer|isn't|wasn't|cannot)\b", re.IGNORECASE)
# Behind a number: another number follows, or the number is only a part of what is stated.
_GOES_ON = re.compile(
    r"\s*(?:or|and|to|through|plus|minus|times|divided|squared|cubed|factorial|mod|(?:less|more|fewer|greater) than)\b",
    re.IGNORECASE,
)
# Before a number: a bound, or a part or a multiple of it.
_NOT_ITSELF = re.compile(
    r"\b(?:than|over|under|above|below|least|most|within|half|third|quarter|twice|thrice|double|triple|times|squared?|cubed?"
    r"|roots?)\b",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"^(?:minus|negative)\s+(?=[\d.$\\])", re.IGNORECASE)


def within(phrase: str, *, number_wanted: bool) -> str:
    """The part of `phrase` that is compared; the whole phrase, which then equals nothing, if it states no single value.

    A formula counts before a number, and a number at the start before one in the middle. "not 5", "4 or 5",
    "at least 5", "twice 5", "5 squared" and "between 4 and 5" state no value; several formulas are a list.
    """
    found = formulas(phrase)
    if found:
        before = phrase.split(found[0], 1)[0]
        return phrase if _NEGATION.search(before) else ", ".join(found)
    cleaned = _NEGATIVE.sub("-", clean(phrase))
    if cleaned.startswith("-") and read_quantity(cleaned) is not None:
        return cleaned
    if not number_wanted or read_quantity(cleaned) is not None or _LONG_WORD.search(cleaned) is None:
        return phrase
    left, equals, right = cleaned.rpartition("=")
    if equals and _SUM.fullmatch(left) and read_quantity(right.strip()) is not None:
        return f"{left.replace('$', '')} = {numbers(right)[0]}"
    stated = numbers(cleaned)
    if not stated:
        return phrase
    before, _, behind = cleaned.partition(stated[0].lstrip("-"))
    if _NEGATION.search(before) or _NOT_ITSELF.search(before) or _GOES_ON.match(behind):
        return phrase
    leading = cleaned.lstrip("$").startswith(stated[0])
    return stated[0] if leading or len(set(stated)) == 1 else phrase

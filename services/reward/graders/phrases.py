"""What a phrase such as "the answer is that she sold $18$ clips" states: one value, or nothing to verify."""

import re

from services.reward.graders.extract import clean, formulas, numbers
from services.reward.graders.quantity import read_quantity

_LONG_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")
_NEGATION = re.compile(r"\b(?:not|never|neither|no longer|isn't|wasn't|cannot)\b", re.IGNORECASE)
_ALTERNATIVE = re.compile(r"\s*(?:or|and|to|through)\b", re.IGNORECASE)


def within(phrase: str, *, number_wanted: bool) -> str:
    """The part of `phrase` that is compared; the whole phrase, which then equals nothing, if it states no single value.

    A formula counts before a number, and a number at the start before one in the middle. "not 5", "4 or 5" and
    "between 4 and 5" state no value; several formulas are a list.
    """
    found = formulas(phrase)
    if found:
        before = phrase.split(found[0], 1)[0]
        return phrase if _NEGATION.search(before) else ", ".join(found)
    cleaned = clean(phrase)
    if not number_wanted or read_quantity(cleaned) is not None or _LONG_WORD.search(cleaned) is None:
        return phrase
    stated = numbers(cleaned)
    if not stated or _NEGATION.search(cleaned.split(stated[0].lstrip("-"), 1)[0]):
        return phrase
    leading = cleaned.lstrip("$").startswith(stated[0])
    alternative = leading and _ALTERNATIVE.match(cleaned.split(stated[0], 1)[1])
    return stated[0] if (leading or len(set(stated)) == 1) and not alternative else phrase

"""Answers that are words: "even", "Monday", "\\text{no solution}"."""

import re

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z]+(?:[ '\-][A-Za-z]+)*")
_ARTICLE = re.compile(r"^(?:the|an|a)\s+", re.IGNORECASE)
_MATH_WORDS = frozenset(["pi", "inf", "infinity", "sin", "cos", "tan", "log", "ln", "exp", "sqrt", "or", "and"])


def plain_words(text: str) -> str:
    """The words of cleaned text, without LaTeX text commands, articles, case and extra spaces."""
    plain = re.sub(r"\s+", " ", _WRAPPED.sub(r"\1", text)).strip().strip(".,;:!*\"'").strip()
    return _ARTICLE.sub("", plain).casefold()


def gold_words(gold: str) -> str | None:
    """The words of a cleaned reference answer; None if it is mathematics ("ab" is a product, "\\text{ab}" a word)."""
    wrapped = _WRAPPED.fullmatch(gold)
    if wrapped is not None:
        return plain_words(wrapped[1]) if re.search(r"[A-Za-z]", wrapped[1]) else None
    longest = max(map(len, re.findall(r"[A-Za-z]+", gold)), default=0)
    if _WORDS.fullmatch(gold) is None or (longest < 3 and gold.lower() != "no"):
        return None
    return None if _MATH_WORDS & set(gold.lower().split()) else plain_words(gold)

"""Answers that are words: "even", "Monday", "\\text{no solution}"."""

import re

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'\- ]*[A-Za-z]")
_ARTICLE = re.compile(r"^(?:the|an|a)\s+", re.IGNORECASE)
_MATH_WORDS = frozenset(["pi", "inf", "infinity", "sin", "cos", "tan", "log", "ln", "exp", "sqrt", "or", "and"])


def plain_words(text: str) -> str:
    """The words of cleaned text, without LaTeX text commands, articles, case and extra spaces."""
    plain = re.sub(r"\s+", " ", _WRAPPED.sub(r"\1", text)).strip().strip(".,;:!*\"'").strip()
    return _ARTICLE.sub("", plain).casefold()


def gold_words(gold: str) -> str | None:
    """The words of a cleaned reference answer; None if it is mathematics ("ab" is a product, "\\text{ab}" a word)."""
    wrapped = _WRAPPED.fullmatch(gold)
    plain = wrapped[1].strip() if wrapped else gold
    if _WORDS.fullmatch(plain) is None or (wrapped is None and len(plain) < 3 and plain.lower() != "no"):
        return None
    if wrapped is None and _MATH_WORDS & set(plain.lower().split()):
        return None
    return plain_words(plain)

"""Answers that are words: "even", "Monday", "\\text{no solution}"."""

import re

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_WORD = r"[^\W\d_\u0370-\u03ff]+"  # Greek letters are mathematics
_WORDS = re.compile(rf"{_WORD}(?:[ '\-]{_WORD})*")
_NO_ALPHABET = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]")
# "Yes, because 7 is prime." "No, it is not." What takes the word back is no reason: "Yes or no", "Yes, but ...".
_REASON = re.compile(r"[,;–—-]?\s+(?:because|since)\s(?:(?![.!?]\s).)*", re.IGNORECASE | re.DOTALL)
_YES_OR_NO = re.compile(r"(yes|no|true|false)[,.;!:–—-]\s*(?!(?:or|and|but)\b)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_DENIED = r"\b(?:no|nope|not|never|cannot|false|wrong|incorrect|untrue)\b|n['’]t\b"
_TAKEN_BACK = {"yes": _DENIED, "true": _DENIED, "no": r"\b(?:yes|yep|yeah)\b", "false": r"\btrue\b"}
_ARTICLE = re.compile(r"^(?:the|an|a)\s+", re.IGNORECASE)
MATH_WORDS = frozenset(["pi", "inf", "infinity", "sin", "cos", "tan", "log", "ln", "exp", "sqrt", "or", "and"])


def plain_words(text: str) -> str:
    """The words of cleaned text, without LaTeX text commands, articles, case and extra spaces."""
    plain = re.sub(r"\s+", " ", _WRAPPED.sub(r"\1", text)).strip().strip(".,;:!*\"'").strip()
    return _ARTICLE.sub("", plain).casefold()


def gold_words(gold: str) -> str | None:
    """The words of a cleaned reference answer; None if it is mathematics ("ab" is a product, "\\text{ab}" a word)."""
    wrapped = _WRAPPED.fullmatch(gold)
    if wrapped is not None:
        return plain_words(wrapped[1]) if re.search(r"[A-Za-z]", wrapped[1]) else None
    longest = max(map(len, re.findall(_WORD, gold)), default=0)
    short = longest < 3 and gold.lower() != "no" and _NO_ALPHABET.search(gold) is None
    if _WORDS.fullmatch(gold) is None or short:
        return None
    return None if MATH_WORDS & set(gold.lower().split()) else plain_words(gold)


def same_words(gold: str, text: str) -> bool:
    """Whether cleaned text says the words of a reference answer (`gold_words`), perhaps with a reason."""
    said = plain_words(text)
    if gold in (said, plain_words(without_reason(said))):
        return True
    answered = _YES_OR_NO.fullmatch(said) if gold in _TAKEN_BACK else None
    if answered is None:
        return False
    return answered[1] == gold and re.search(_TAKEN_BACK[gold], answered["rest"]) is None


def without_reason(text: str) -> str:
    """ "Yes" of "Yes, because 7 is prime"."""
    return _REASON.sub("", text)

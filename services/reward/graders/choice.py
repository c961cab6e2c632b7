"""Multiple choice: letters that name options, in the forms in which completions state them."""

import re

_GOLD = re.compile(r"\(?([A-J])\)?(?:\s*,\s*\(?([A-J])\)?)*")
# An option with its text: AMC's "\textbf{(B)}\ 12", "(B) 12", "B) 12", "B. 12". "(A)(B)" is a product, "(A) + B" a sum.
_GOLD_WITH_TEXT = re.compile(r"(?:\(([A-J])\)\s+(?![-+*/^=])|([A-J])(?:\)\s*|[.:]\s+))\S.*", re.DOTALL)
_PREFIX = re.compile(r"(?:option|choice|answer|letter)\s+|^\W*(?:答案|选项?)(?:是|为)?[：:\s]*", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_STATED = re.compile(r"\(?([A-Ja-j])(?:\)|\.|:|$)\s*(.*)", re.DOTALL)
# The reason is one sentence: the next one may take the option back.
_WITH_REASON = re.compile(r"\(?([A-J])\)?\s*[,;–—-]?\s*(?:because|since)\s(?:(?![.!?]\s).)*")
# "So, option (B) is the correct answer"
_CORRECT = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:option\s+|choice\s+|answer\s+)?\(?([A-J])\)?\s+is\s+(?:the\s+)?"
    r"(?:correct|right|best)(?:\s+(?:answer|option|choice))?",
    re.IGNORECASE,
)
_BARE_LETTER = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])")


def gold_letters(gold: str) -> frozenset[str] | None:
    """The letters of a cleaned reference answer such as "B", "(B) 12" or "A, C"; None if it is something else."""
    plain = _PREFIX.sub("", _TEXT.sub(r"\1", gold).strip(), count=1)
    with_text = _GOLD_WITH_TEXT.fullmatch(plain)
    if with_text is not None:
        return frozenset(with_text[1] or with_text[2])
    if _GOLD.fullmatch(plain) is None:
        return None
    return frozenset(re.findall(r"[A-J]", plain))


def stated_letters(text: str) -> frozenset[str] | None:
    """The letters that cleaned text states; None if it states none.

    "B", "(b)", "B) 12 m", "option B", "B, because A is odd", "B is correct", "A and C", "AC".
    """
    plain = _PREFIX.sub("", _TEXT.sub(r"\1", text).replace("*", "").strip(), count=1).strip()
    several = re.fullmatch(r"\(?[A-J]\)?(?:\s*(?:,|and|,\s*and|&)\s*\(?[A-J]\)?)+", plain)
    if several is not None:
        return frozenset(re.findall(r"[A-J]", plain))
    if re.fullmatch(r"[A-J]{2,10}", plain) and list(plain) == sorted(set(plain)):
        return frozenset(plain)
    correct = _CORRECT.fullmatch(plain)
    if correct is not None:
        return frozenset(correct[1].upper())
    reasoned = _WITH_REASON.fullmatch(plain)
    if reasoned is not None:
        return frozenset(reasoned[1])
    match = _STATED.fullmatch(plain)
    if match is None or _BARE_LETTER.search(match[2]):
        return None
    return frozenset(match[1].upper())

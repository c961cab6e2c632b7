"""The numbers of a text, for completions that mark no answer: the last one is taken for it.

"9 * 2 = 18 eggs" -> 9, 2, 18        "1 1/2" -> 1 1/2        "so 2\\pi" -> 2\\pi, which is compared as it stands
"""

import re

from services.reward.graders.units import SCALES, is_unit

TAIL_CHARS = 4000

FRACTION_SIGNS = "½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"

_FRACTION = rf"(?:[{FRACTION_SIGNS}]|" r"\\[dtc]?frac\s*(?:\{\s*-?\d+\s*\}\s*\{\s*\d+\s*\}|\d\s*\d(?!\d)))"
_SLASH = r"\d+\s?/\s?\d+"
# Narrow and hard spaces separate thousands; an ordinary space does so only where nothing but zeros follows.
_DIGITS = r"\d{1,3}(?:(?:,|\{,\}|\\,|[\u00a0\u202f\u2009])\d{3})+(?!\d)|\d{1,3}(?: 000)+(?!\d)|\d+"
_POWER_OF_TEN = r"\s?(?:\\times|\\cdot|×|·|\*|x)\s?10\s?(?:\^|\*\*)\s?\{?-?\d{1,3}\}?"
_NUMBER = re.compile(
    r"(?<![0-9A-Za-z_À-ɏͰ-Ͽ.\\^])(?P<sign>(?<![\w)\]}$%])[-−–](?P<apart>\s)?|[Nn]egative\s)?"
    r"(?:\\?[$€£¥₹]\s?)?(?P<sign2>[-−])?"
    rf"(?P<number>(?:\d+\s?)?{_FRACTION}|(?:\d+ )?{_SLASH}"
    rf"|(?:{_DIGITS})(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?!\w)|{_POWER_OF_TEN})?|\.\d+)(?P<percent>\s?\\?%)?"
)
_GLUED = re.compile(r"[A-Za-z²³°]+")
_SCALE = re.compile(rf"\s(?:{'|'.join(SCALES)})\b", re.IGNORECASE)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
# A minus with a space behind it is a sign where a value begins; elsewhere it subtracts, or is the mark of a list.
_VALUE_BEGINS = re.compile(r"(?:[=(≈]|\bis|\b[Aa]nswer:)\s*$")
_EXPONENT_BEFORE = re.compile(r"[\^_]\s*\{\s*-?$")
_OPERATION_BEFORE = re.compile(
    r"(?:\\sqrt\s*(?:\[\d+\])?\s*\{?|√\s*\(?|\\[dtc]?frac\s*\{[^{}]*\}\s*\{|[A-Za-z)\]}]\s?/)\s*$"
)
_OPERATION_BEHIND = re.compile(r"\s?(?:\\?pi\b|π|\\sqrt|√|\*\*\s?\d+|\^(?!\s*\{?\\circ)\s*(?:\{[^{}]*\}|[\w-]*))")
_CONTEXT_CHARS = 60


def numbers(text: str) -> list[str]:
    """The numbers near the end that stand alone: not part of a word, no factor ("2x"), no ordinal ("2nd").

    One that is part of a root, a power or a fraction of symbols stands in the list with as much of it as makes clear
    that it is not the number itself.
    """
    tail = text[-TAIL_CHARS:]
    found: list[str] = []
    for match in _NUMBER.finditer(tail):
        before = tail[max(0, match.start() - _CONTEXT_CHARS) : match.start()]
        glued = _GLUED.match(tail, match.end())
        operation = _OPERATION_BEHIND.match(tail, match.end())
        if glued is not None and operation is None and (_ORDINAL.match(glued[0]) or not is_unit(glued[0], glued=True)):
            continue
        if _EXPONENT_BEFORE.search(before):
            continue
        minus = match["sign2"] or (match["sign"] and (not match["apart"] or _VALUE_BEGINS.search(before)))
        scale = _SCALE.match(tail, match.end())
        number = ("-" if minus else "") + match["number"] + (match["percent"] or "") + (scale[0] if scale else "")
        outer = _OPERATION_BEFORE.search(before)
        found.append((outer[0] if outer else "") + number + (operation[0] if operation else ""))
    return found

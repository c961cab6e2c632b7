"""Finds the answer in a completion: the text that the graders then compare. Never looks at the prompt.

    "so 3 + 4 = 7. #### 7"  ->  "7"          every scan is linear in the length of the completion

A marker decides even when what it marks is empty or cut off: a completion that ends in `\\boxed{` or `####` has no
answer, and no number from its reasoning is taken instead.
"""

import re
import unicodedata
from dataclasses import dataclass

from services.reward.graders.numerals import FRACTION_SIGNS, TAIL_CHARS
from services.reward.graders.quantity import read_quantity
from services.reward.graders.words import MATH_WORDS

CLEAN_CHARS_MAX = 2000

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_PHRASE = re.compile(
    r"(?:\b(?:(?:final\s+)?answer|(?:correct|right|best)\s+(?:option|choice))\b\s*(?:\([^()\n]{0,20}\)\s*)?"
    r"(?:\*\*?|__)?[^\S\n]*(?:is\b[^\S\n]*:?|:|=)"
    # "**Final Answer**" on a line of its own.
    r"|^[#>*_ \t]*(?:final[ \t]+)?answer(?=[*_ \t]*\n))(?:[^\S\n]*(?:\*\*?|__?)(?=\s))?\s*",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWER_HEADING = re.compile(r"[*_\s]*(?:final\s+)?answer[*_:\s]*", re.IGNORECASE)
# The first line of a solution: words, or something computed. "18 dollars" and "x = 18" are answers.
_STEP = re.compile(r"[*_\s]*[A-Za-z]{3}|(?=[^=\n]*\d)[^=\n]*=")
_FINAL = re.compile(r"\bfinal\b|\bis\b", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}(?:\s*\{[^{}]*\})?")
# Words side by side: "abc" of abc+abd is a product.
_SENTENCE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+(?:[\s,.]+[A-Za-z]+)+")
_HEADING = re.compile(r"\s*[*_]*[A-Za-z]{3}")
_TAG = "<answer>"
_OPEN_THOUGHT = re.compile(r"^[ \t]*<think>", re.MULTILINE)  # elsewhere the tag is mentioned
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # GSM8K's annotations: 5*2=<<5*2=10>>10
# Of Markdown; 2**3 is a power.
_EMPHASIS = re.compile(r"(?<![\w)\]}])(?:\*\*|__)|(?:\*\*|__)(?![\w(\[{])")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# A $ that closes stands behind what it closes, or apart on both sides: "$5 and $10" is no formula.
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<display>(?:[^$\\]|\\.)+)\$\$|(?<!\\)\$(?=\S)(?P<inline>(?:[^$\\]|\\.)+)(?<=\S)\$(?!\d)"
    r"|(?<!\\)\$(?=\s)(?P<apart>(?:[^$\\]|\\.)+)(?<=\s)\$|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]",
    re.DOTALL,
)
_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"),
    ("*", "*"), ("_", "_"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"),
)  # fmt: skip
_SPELLINGS = {
    "−": "-", "–": "-", "\\left": "", "\\right": "", "\\displaystyle": "", "\\!": "", "{,}": ",",
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "²": "^2", "³": "^3",
    "×": "\\times ", "·": "\\cdot ", "÷": "/",
    "\\varnothing": "\\emptyset", "∅": "\\emptyset", "∞": "\\infty", "π": "\\pi",
    "\\leqslant": "\\leq", "\\geqslant": "\\geq", "≤": "\\leq ", "≥": "\\geq ", "≈": "\\approx ",
    "\\langle": "(", "\\rangle": ")", "{:}": ":", "\\mathrm{i}": " i", "\\mathrm{e}": " e",
    **dict.fromkeys(("\\bf", "\\rm", "\\large", "\\Large", "\\LARGE", "\\huge", "\\Huge"), ""),
    "\\lbrace": "\\{", "\\rbrace": "\\}", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
    **{one: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", one).split("⁄")) for one in FRACTION_SIGNS},
}  # fmt: skip
# \left must not be found at the start of \leftarrow.
_SPELLING = re.compile(
    "|".join(re.escape(one) + ("(?![A-Za-z])" if one[-1].isascii() and one[-1].isalpha() else "") for one in _SPELLINGS)
)


_ROOT_SIGN = re.compile(r"√\s*(\d+|[A-Za-z])")
_COLOR = re.compile(r"\\(?:textcolor|color)\s*\{\w+\}\s*")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textrm|textit|textnormal|emph|underline|mathrm|mathbf|mathit|boldsymbol|bold|mbox)"
    r"\s*\{\s*([^{}]*)\}"
)
_DIGITS_ALONE = re.compile(r"[-+$\\]*[\d.,:/]*\d[\d.,:/]*\s*(?:\\?%)?\s*")
_REPEATING = re.compile(r"(?<=[\d.])\\(?:dot\s*\{(\d)\}(\d*)\\dot\s*\{(\d)\}|(?:dot|bar)\s*\{(\d+)\})")
_ROW_GAP = re.compile(r"(?<=\\\\)\[-?[\d.]+\s?[a-z]{2}\]")  # of a matrix: \\[4pt]
_HALF_DAY = re.compile(r"\b([AaPp])\.\s?([Mm])\b\.?")
# A unit written as a fraction: \frac{\text{m}}{\text{s}} is \text{m/s}.
_UNIT_FRACTION = re.compile(r"\\frac\s*\{\\(?:text|mathrm)\{([^{}]*)\}\}\s*\{\\(?:text|mathrm)\{([^{}]*)\}\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One `\\boxed{...}`; `content` is None if its bracket is never closed."""

    start: int
    end: int
    content: str | None


def boxes(text: str) -> list[Box]:
    """The outermost boxes of `text` in order. Linear: a box that is never closed ends the scan."""
    found: list[Box] = []
    position = 0
    while (match := _BOX.search(text, position)) is not None:
        start = match.end()
        if text[start : start + 1] != "{":
            token = re.compile(r"[^\s$.,{}\\]*").match(text, start)
            end = token.end() if token else start
            found.append(Box(start=match.start(), end=end, content=text[start:end]))
            position = max(end, match.end())
            continue
        end = _closing(text, start)
        if end is None:
            found.append(Box(start=match.start(), end=len(text), content=None))
            break
        found.append(Box(start=match.start(), end=end + 1, content=text[start + 1 : end]))
        position = end + 1
    return found


def _closing(text: str, start: int) -> int | None:
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return brace.start()
    return None


def last_boxes_joined(text: str, found: list[Box]) -> str | None:
    """The last box; boxes with only a separator between them ("\\boxed{1} and \\boxed{2}") are one list."""
    contents: list[str] = []
    for index in range(len(found) - 1, -1, -1):
        content = found[index].content
        if content is None:
            return None
        contents.insert(0, content)
        if index == 0 or not re.fullmatch(
            r"[\s$]*(?:,|;|and|or|,\s*and|,\s*or)[\s$]*", text[found[index - 1].end : found[index].start]
        ):
            break
    return ", ".join(contents)


def hash_answer(text: str) -> tuple[int, str] | None:
    """Where the last GSM8K marker `####` stands and the rest of its line; None without a marker."""
    position = text.rfind("####")
    if position < 0:
        return None
    rest = text[position + 4 : position + 4 + CLEAN_CHARS_MAX].split("\n", 1)[0]
    return position, rest.lstrip("#")


def is_heading(line: str) -> bool:
    """Whether what stands behind `####` is words, as in Markdown's "#### Step 2: ..."."""
    return _HEADING.match(line) is not None


def is_answer_heading(line: str) -> bool:
    """Whether what stands behind `####` says only that the answer follows: "#### Final Answer"."""
    return _ANSWER_HEADING.fullmatch(line) is not None


def tagged_answer(text: str) -> tuple[int, str] | None:
    """Where the last `<answer>` stands and the text in it, which a stop string may have left open; None without one."""
    position = text.rfind(_TAG)
    return None if position < 0 else (position, text[position + len(_TAG) :].split("</answer>", 1)[0])


def is_prose(text: str, words: int) -> bool:
    """Whether cleaned text that is no plain words has so many of them: read as mathematics, letters are factors."""
    sentences = _SENTENCE.findall(_WRAPPED.sub(" ", _ENVIRONMENT.sub(" ", text)))
    found: list[str] = re.findall(r"[A-Za-z]{3,}", " ".join(sentences))
    return sum(word.lower() not in MATH_WORDS for word in found) >= words


def said_at_last(text: str) -> str | None:
    """What stands outside of the thoughts; None if the last one, which begins a line, never ends.

    What thoughts try out is not the answer, whatever they put into a box. Where the chat template began the first
    one, it reaches from the start of `text` to a `</think>`.
    """
    *pieces, rest = text.split("</think>")
    said = ""
    for piece in pieces:
        before, begun, _ = piece.partition("<think>")
        said = f"{said}{before}\n" if begun else ""
    return None if _OPEN_THOUGHT.search(rest) else said + rest


def phrase_answer(text: str, *, may_head: bool = True) -> str | None:
    """What follows the last "answer is", "answer:" or "answer =", up to the end of the sentence.

    Where a bare "Answer:" `may_head` a solution of several lines, the first line of one is not the answer: None then.
    """
    last = None
    tail = text[-TAIL_CHARS:]
    for match in _PHRASE.finditer(tail):
        last = match
    if last is None:
        return None
    start, shown = last.end(), ""
    display = _MATH.match(tail, start)
    if display is not None and (display["display"] or display["square"]):
        start, shown = display.end(), display[0]
    line, _, below = tail[start:].partition("\n")
    heads = may_head and not shown and "\n" in last[0] and _FINAL.search(last[0]) is None
    if heads and _STEP.match(line) and below.strip():
        return None
    rest = _EMPHASIS.sub("", _CALCULATOR.sub("", line))
    end = _SENTENCE_END.search(rest)
    return shown + (rest[: end.start()] if end else rest)


def formulas(text: str) -> list[str]:
    """The contents of each `$...$`, `\\(...\\)` and `\\[...\\]` near the end of `text`."""
    text = text.rstrip()
    tail = text[-TAIL_CHARS:]
    if len(tail) < len(text) and "\n" in tail:
        tail = tail.partition("\n")[2]  # a line cut in two may begin inside of a formula
    return [match[match.lastgroup or 0] for match in _MATH.finditer(tail)]


def clean(text: str) -> str:
    """One spelling for what LaTeX and Unicode write in several ways; drops wrappers and the full stop at the end."""
    text = re.sub(r",\\!\s*(?=\d{3})", ",", text[:CLEAN_CHARS_MAX].strip())
    text = _REPEATING.sub(r"\\overline{\1\2\3\4}", _ROW_GAP.sub("", text))
    text = _SPELLING.sub(lambda match: _SPELLINGS[match[0]], text)
    text = _ROOT_SIGN.sub(r"\\sqrt{\1}", text)
    text = _UNIT_FRACTION.sub(r"\\text{\1/\2}", _COLOR.sub("", _HALF_DAY.sub(r"\1\2", text)))
    before = None
    while before != text:
        before = text
        text = text.strip().removeprefix("\\approx")
        thin = text.endswith(("\\,", "\\;", "\\:"))
        text = (text[:-2] if thin else text.rstrip(".,;:。，；：")).strip()
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : -len(closing)]
            if (
                len(text) > len(opening) + len(closing)
                and text.startswith(opening)
                and text.endswith(closing)
                and opening not in inner
            ):
                text = inner
        box = _BOX.match(text)
        if box is not None and _closing(text, box.end()) == len(text) - 1 and text[box.end()] == "{":
            text = text[box.end() + 1 : -1]
        wrapped = _WRAPPED.fullmatch(text)
        if wrapped is not None and (_DIGITS_ALONE.fullmatch(wrapped[1]) or read_quantity(wrapped[1]) is not None):
            text = wrapped[1]
    return _thin_spaces(text)


def _thin_spaces(text: str) -> str:
    # 1\,234 is 1,234; elsewhere a thin space is a space.
    text = re.sub(r"(?<=\d)\\[,;](?=\d{3}(?!\d))", ",", text)
    # A space behind two backslashes stands after the end of a matrix's row.
    return re.sub(r"(?<!\\)\\[,;: ]|~", " ", text)

"""The grader `math`: finds the answer in a completion and verifies it against the reference answer.

    completion ─extract─► candidate ─clean─► quantity? ─► exact fractions
                                             letters?  ─► the same options
                                             words?    ─► the same words
                                             else      ─► guard ─► math-verify (symbolic)

The reference answer decides which comparison is used. Reward 1 only if the comparison says equal; every doubt is 0.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pydantic import Field

from services.reward.graders import choice, extract, guard, numerals, phrases, quantity, symbolic, words
from services.reward.graders.base import Verdict
from services.reward.scorer import ScoreRequest
from services.runtime.config import Section
from services.runtime.errors import ScoreError

_PROSE, _PROSE_GOLD, _PROSE_STATED = 3, 6, 2
"""Words of a sentence. To multiply its letters takes long: an answer has as few as no expression holds, a reference
answer, which then cannot be graded at all, may hold more ("3 red and 2 blue balls"), but not behind "the answer is"."""


class MathOptions(Section):
    extract: Literal["auto", "boxed", "hash", "phrase", "last_number", "choice", "whole"] = "auto"
    """Where the answer stands. auto: the latest of the last box, the last #### and the last <answer>; without those,
    what follows "answer is"; without that, the last number (or formula, if the reference answer is one)."""
    which: Literal["last", "first", "all"] = "last"
    """Which box counts if there are several; all: every one must be right."""
    answer_after: str = ""
    """Only text behind the last occurrence of this counts; without one there is no answer. Empty: what stands outside
    of <think>...</think> counts, and a thought that never ends has no answer."""
    tolerance: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Relative error that a plain number may have, also where the reference answer is a root or has π in it."""
    percent: Literal["as_unit", "exact"] = "as_unit"
    """as_unit: 50% equals 50 as well as 0.5. exact: 50% equals only 0.5."""
    evaluated: bool = False
    """Whether a plain number must be given as one: then 3+4 is no answer where 7 is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """A reference answer that can be compared with; exactly one kind."""

    text: str
    letters: frozenset[str] | None
    number: quantity.Quantity | None
    words: str | None


class MathGrader:
    """See the module. Fast for plain numbers: no algebra system is asked."""

    def __init__(self, options: MathOptions) -> None:
        self._options = options

    def check_answer(self, answer: str) -> str | None:
        try:
            read_gold(answer, self._options.extract == "choice")
        except ScoreError as error:
            return str(error)
        return None

    def grade(self, request: ScoreRequest) -> Verdict:
        gold = read_gold(request.answer, self._options.extract == "choice")
        text = self._relevant(request)
        if text is None:
            missing = self._options.answer_after or "</think>"
            return Verdict(reward=0.0, extracted=None, reason=f"no {missing} before an answer")
        raw = self._candidates(text, gold)
        if isinstance(raw, str):
            return Verdict(reward=0.0, extracted=None, reason=raw)
        reason, shown = None, None
        for candidate in raw:
            reason, shown = self._compare(candidate, gold)
            if reason is not None:
                break
        return Verdict(reward=float(reason is None), extracted=shown, reason=reason or "equal to the reference answer")

    def _relevant(self, request: ScoreRequest) -> str | None:
        text = request.completion
        if request.prompt and text.startswith(request.prompt):
            # A completion that repeats the prompt does not answer with what the prompt shows.
            text = text[len(request.prompt) :]
        marker = self._options.answer_after
        if not marker:
            return extract.said_at_last(text)
        return text.rpartition(marker)[2] if marker in text else None

    def _candidates(self, text: str, gold: Gold) -> list[str] | str:
        """The texts that must each equal the reference answer, or why there are none."""
        match self._options.extract:
            case "auto" | "choice":
                tag = extract.tagged_answer(text) if self._options.which == "last" else None
                if tag is None:
                    return self._marked(text, gold) or _unmarked(text, gold)
                start, inside = tag
                # A box or #### inside or behind the tag counts before what else the tag holds.
                marked = self._marked(text[start:], gold)
                return marked or _phrase(inside, gold) or [_stated(inside, gold, may_reason=True)]
            case "boxed":
                return self._marked(text, gold, hashed=False) or "no box"
            case "hash":
                return self._marked(text, gold, boxed=False) or "no ####"
            case "phrase":
                return _phrase(text, gold) or "no answer phrase"
            case "last_number":
                return numerals.numbers(text)[-1:] or "no number"
            case "whole":
                return [text]

    def _marked(self, text: str, gold: Gold, *, boxed: bool = True, hashed: bool = True) -> list[str] | str | None:
        found = extract.boxes(text) if boxed else []
        marker = extract.hash_answer(text) if hashed else None
        if marker is not None and (not found or found[-1].start < marker[0]):
            # "#### Step 2: add them up" heads a section, if an answer is stated below it.
            if extract.is_answer_heading(marker[1]):
                return _unmarked(text[marker[0] + 4 :].lstrip("#"), gold)
            stated = _phrase(text[marker[0] :], gold) if extract.is_heading(marker[1]) else None
            return stated or [marker[1]]
        if not found:
            return None
        if self._options.which == "first":
            found = found[:1]
        contents = (
            [box.content for box in found] if self._options.which == "all" else [extract.last_boxes_joined(text, found)]
        )
        if None in contents:
            return "the box is never closed"
        return [content for content in contents if content is not None]

    def _compare(self, candidate: str, gold: Gold) -> tuple[str | None, str]:
        """Why the candidate is not equal (None if it is), and the candidate as it was compared."""
        if len(candidate) > extract.CLEAN_CHARS_MAX:
            return f"the answer is longer than {extract.CLEAN_CHARS_MAX} characters", candidate[:200]
        answer = extract.clean(candidate)
        shown = answer[:200]
        reason = guard.unprintable(answer) or (None if answer else "the answer is empty")
        if reason is None:
            reason = self._differs(answer, gold)
        return reason, shown

    def _differs(self, answer: str, gold: Gold) -> str | None:
        if gold.letters is not None:
            letters = choice.stated_letters(answer)
            if letters is None:
                return "no option is stated"
            return None if letters == gold.letters else "another option than the reference answer"
        if gold.words is not None:
            return None if words.same_words(gold.words, answer) else "other words than the reference answer"
        number = quantity.read_quantity(answer)
        if number is None and gold.number is not None:
            number = quantity.read_quantity(_named_value(answer))
        if gold.number is not None and number is not None:
            as_unit = self._options.percent == "as_unit"
            return quantity.same_quantity(
                gold.number, number, tolerance=self._options.tolerance, percent_as_unit=as_unit
            )
        if gold.number is not None and self._options.evaluated:
            return "not a plain number"
        denied = phrases.NEGATION.search(answer) and not phrases.NEGATION.search(gold.text)
        # What names a value is not multiplied out: "Volume of the cone = 9\pi".
        value = answer if "=" in gold.text else answer.rpartition("=")[2]
        if answer != gold.text and (denied or extract.is_prose(value, _PROSE)):
            return "a sentence"
        reason = symbolic.same_expression(gold.text, answer)
        if reason is not None and self._options.tolerance and number is not None:
            value = symbolic.approximate(gold.text)
            if value is not None and quantity.close(value, number.value, self._options.tolerance):
                return None
        return reason


@lru_cache(maxsize=1024)
def read_gold(answer: str, is_choice: bool) -> Gold:
    """Reads a reference answer: GSM8K's (after ####), MATH's (boxed), behind "the answer is", or the answer alone.

    Raises ScoreError.
    """
    text, prose_words = _gold_text(answer)
    if not answer.strip():
        raise ScoreError("The reference answer is empty.")
    if not text:
        raise ScoreError(
            f"The reference answer {answer!r:.80} cannot be graded: what it marks is empty or never ends, "
            f"or it is longer than {extract.CLEAN_CHARS_MAX} characters."
        )
    reason = guard.unprintable(text)
    if reason is not None:
        raise ScoreError(f"The reference answer {text!r:.80} cannot be graded: it holds {reason}.")
    letters = choice.gold_letters(text)
    if letters is not None or is_choice:
        if letters is None:
            raise ScoreError(f"The reference answer {text!r:.80} cannot be graded: it names no option from A to J.")
        return Gold(text=text, letters=letters, number=None, words=None)
    number = quantity.read_quantity(text)
    if number is not None:
        return Gold(text=text, letters=None, number=number, words=None)
    plain = words.gold_words(text)
    if plain is not None:
        return Gold(text=text, letters=None, number=None, words=plain)
    prose = (
        "it is a sentence: mark the answer in it by #### or \\boxed{}" if extract.is_prose(text, prose_words) else None
    )
    reason = prose or symbolic.why_unparsable(text)
    if reason is not None:
        raise ScoreError(f"The reference answer {text!r:.80} cannot be graded: {reason}.")
    return Gold(text=text, letters=None, number=None, words=None)


def _gold_text(answer: str) -> tuple[str, int]:
    """The cleaned text that is compared with, and how many words make a sentence of it."""
    marker = extract.hash_answer(answer)
    if marker is not None:
        return extract.clean(marker[1]), _PROSE_GOLD
    found = extract.boxes(answer)
    if found:
        return extract.clean(extract.last_boxes_joined(answer, found) or ""), _PROSE_GOLD
    stated = extract.phrase_answer(answer)
    if stated is not None:
        return extract.clean(phrases.within(words.without_reason(stated), number_wanted=False)), _PROSE_STATED
    return extract.clean(answer) if len(answer) <= extract.CLEAN_CHARS_MAX else "", _PROSE_GOLD


def _phrase(text: str, gold: Gold) -> list[str] | None:
    phrase = extract.phrase_answer(text, may_head=gold.letters is None and gold.words is None)
    return None if phrase is None else [_stated(phrase, gold)]


def _stated(phrase: str, gold: Gold, *, may_reason: bool = False) -> str:
    return phrases.within(phrase, number_wanted=gold.number is not None, may_reason=may_reason)


def _unmarked(text: str, gold: Gold) -> list[str] | str:
    stated = _phrase(text, gold)
    if stated is not None:
        return stated
    if gold.letters is not None:
        return [text.strip()] if choice.stated_letters(text[:40]) else _last_line(text)
    if gold.number is not None:
        return numerals.numbers(text)[-1:] or "no number"
    return extract.formulas(text)[-1:] or _last_line(text)


def _last_line(text: str) -> list[str] | str:
    lines = text.strip().splitlines()
    return [lines[-1]] if lines else "no answer"


def _named_value(answer: str) -> str:
    """ "5" of "x = 5", "x \\approx 5" and "\\text{Total} = 5"; the text itself if no name stands before the sign."""
    name, equals, value = answer.replace("\\approx", "=").rpartition("=")
    named = equals and len(name) <= 40 and "=" not in name and not any(one.isdigit() for one in name)
    return value.strip() if named and not any(one in name for one in "+*/^<>!,") else answer

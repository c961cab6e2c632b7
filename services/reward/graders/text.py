"""Graders of plain text: `exact`, `regex` and `format`."""

import re
from collections import deque
from typing import Literal

from pydantic import Field, field_validator

from services.reward.graders.base import Verdict
from services.reward.scorer import ScoreRequest
from services.runtime.config import Section


class ExactOptions(Section):
    strip: bool = True
    """Whether white space at both ends is ignored."""
    ignore_case: bool = False
    """Whether upper and lower case are the same."""


class ExactGrader:
    """1 if the completion is the reference answer, character by character."""

    def __init__(self, options: ExactOptions) -> None:
        self._options = options

    def check_answer(self, answer: str) -> str | None:
        return None if self._normal(answer) else "The reference answer is empty."

    def grade(self, request: ScoreRequest) -> Verdict:
        answer = self._normal(request.completion)
        equal = bool(answer) and answer == self._normal(request.answer)
        return Verdict(
            reward=float(equal),
            extracted=request.completion.strip()[:200] or None,
            reason="equal to the reference answer" if equal else "not the reference answer",
        )

    def _normal(self, text: str) -> str:
        text = text.strip() if self._options.strip else text
        return text.casefold() if self._options.ignore_case else text


class RegexOptions(Section):
    pattern: str = Field(min_length=1, max_length=2000)
    """Python regular expression. With a group, the last match's first group must equal the reference answer; without
    one, a match is enough."""
    ignore_case: bool = False
    """Whether upper and lower case are the same."""
    whole: bool = False
    """Whether the pattern must match the whole completion."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"it is not a regular expression ({error})") from error
        return pattern


class RegexGrader:
    """1 if the pattern matches, and, if it has a group, the group is the reference answer."""

    def __init__(self, options: RegexOptions) -> None:
        flags = re.DOTALL | (re.IGNORECASE if options.ignore_case else 0)
        self._pattern = re.compile(options.pattern, flags)
        self._options = options

    def check_answer(self, answer: str) -> str | None:
        return "The reference answer is empty." if self._pattern.groups and not answer.strip() else None

    def grade(self, request: ScoreRequest) -> Verdict:
        if self._options.whole:
            last = self._pattern.fullmatch(request.completion)
        else:
            matches = deque(self._pattern.finditer(request.completion), maxlen=1)
            last = matches.pop() if matches else None
        if last is None:
            return Verdict(reward=0.0, extracted=None, reason="no match")
        if not self._pattern.groups:
            return Verdict(reward=1.0, extracted=last[0][:200], reason="matches")
        found, wanted = (last[1] or "").strip(), request.answer.strip()
        if self._options.ignore_case:
            found, wanted = found.casefold(), wanted.casefold()
        equal = bool(found) and found == wanted
        reason = "equal to the reference answer" if equal else "not the reference answer"
        return Verdict(reward=float(equal), extracted=found[:200] or None, reason=reason)


class FormatOptions(Section):
    require: Literal["boxed", "hash", "think_answer", "pattern"] = "boxed"
    """boxed: exactly one box, closed and not empty. hash: a last line "#### answer". think_answer: the completion is
    <think>...</think><answer>...</answer>. pattern: `pattern` matches the whole completion."""
    pattern: str = ""
    """Python regular expression for require = "pattern"."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return RegexOptions(pattern=pattern).pattern if pattern else pattern


_HASH_LINE = re.compile(r"####[ \t]*\S[^\n]*\s*$")
_THINK_ANSWER = re.compile(
    r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>\s*(?:(?!</?answer>).)*\S\s*</answer>\s*", re.DOTALL
)


class FormatGrader:
    """1 if the completion has the form. Says nothing about being right: give it a small weight beside `math`."""

    def __init__(self, options: FormatOptions) -> None:
        self._options = options
        self._pattern = re.compile(options.pattern, re.DOTALL)

    def check_answer(self, answer: str) -> str | None:
        return None

    def grade(self, request: ScoreRequest) -> Verdict:
        formed = self._formed(request.completion)
        return Verdict(
            reward=float(formed), extracted=None, reason="has the form" if formed else "does not have the form"
        )

    def _formed(self, text: str) -> bool:
        from services.reward.graders.extract import boxes

        match self._options.require:
            case "boxed":
                found = boxes(text)
                return len(found) == 1 and bool((found[0].content or "").strip())
            case "hash":
                return text.count("####") == 1 and _HASH_LINE.search(text) is not None
            case "think_answer":
                return _THINK_ANSWER.fullmatch(text) is not None
            case "pattern":
                return bool(self._options.pattern) and self._pattern.fullmatch(text) is not None

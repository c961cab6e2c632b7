"""The grader `code`: runs a program that a policy wrote against tests, in a sandbox.

The reference answer holds the tests as JSON, any of:

    {"stdin": [{"in": "3 4\\n", "out": "7\\n"}]}                           what the program prints
    {"calls": [{"function": "add", "arguments": [3, 4], "value": 7}]}     what its functions return
    {"asserts": ["assert add(3, 4) == 7"]}                                statements that must not raise

Expected outputs and values never enter the sandbox, so a program cannot print them without computing them. Asserts run
inside it, where a determined program can cheat: prefer the others.
"""

import json
import re
import textwrap
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

from pydantic import Field, ValidationError

from services.reward import sandbox
from services.reward.graders.base import Verdict
from services.reward.scorer import ScoreRequest
from services.runtime.config import Section
from services.runtime.errors import ScoreError

# A block ends at a fence indented as its first one or, as in Markdown, by up to three spaces; a deeper one is of the
# program, of a docstring for example. A block that is never closed reaches to the end, so that the scan is linear.
# "```</think>" begins none.
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*+)```[ \t]*+(?P<language>[\w+-]*+)(?!<|(?<=`)[^\s{])[^\n`]*+\n(?P<body>.*?)"
    r"(?:^(?:(?P=indent)| {0,3})(?P<closed>```)[ \t]*+$|\Z)",
    re.DOTALL | re.MULTILINE,
)
_DEFINED = re.compile(r"^[ \t]*(?:(?:async[ \t]+def|def|class)[ \t]+(\w+)|(\w+)[ \t]*=)", re.MULTILINE)
_CALLED = re.compile(r"\b(\w+)\s*\(")
_PYTHON = ("python", "py", "python3")


class CodeOptions(Section):
    cpu_s: int = Field(default=2, ge=1, le=60)
    """CPU seconds of one run of the program."""
    wall_s: float = Field(default=5.0, gt=0.0, le=60.0)
    """Seconds for all tests of one completion together."""
    memory_bytes: int = Field(default=256 << 20, ge=64 << 20, le=4 << 30)
    """Address space of the program."""
    partial: bool = False
    """Whether the reward is the share of tests that pass; else it is 1 only if all pass."""
    fence: Literal["optional", "required"] = "optional"
    """Whether a completion without a ``` block is a program as it stands, or no answer."""


class StdinCase(Section):
    given: str = Field(alias="in")
    """Standard input."""
    wanted: str = Field(alias="out")
    """Standard output; white space at line ends does not count."""


class CallCase(Section):
    function: str
    """Name of a function that the program defines."""
    arguments: list[object]
    """Its arguments, JSON values."""
    value: object
    """What it must return; tuples count as lists."""


class Tests(Section):
    """The tests of one reference answer."""

    stdin: list[StdinCase] = Field(default_factory=list[StdinCase], max_length=100)
    """Runs of the program."""
    calls: list[CallCase] = Field(default_factory=list[CallCase], max_length=1000)
    """Calls of its functions."""
    asserts: list[str] = Field(default_factory=list[str], max_length=1000)
    """Statements after it."""

    @property
    def count(self) -> int:
        return len(self.stdin) + len(self.calls) + len(self.asserts)


@dataclass(slots=True, kw_only=True)
class _Tally:
    passed: int = 0
    problem: str | None = None

    def note(self, passed: bool, problem: str) -> None:
        self.passed += passed
        if not passed and self.problem is None:
            self.problem = problem


class CodeGrader:
    """See the module. `rlimits_suffice`: the host's owner accepts a sandbox without namespaces where there are none."""

    def __init__(self, options: CodeOptions, rlimits_suffice: bool) -> None:
        self._options = options
        self._rlimits_suffice = rlimits_suffice

    def check_answer(self, answer: str) -> str | None:
        try:
            read_tests(answer)
        except ScoreError as error:
            return str(error)
        return None

    def grade(self, request: ScoreRequest) -> Verdict:
        tests = read_tests(request.answer)
        program = self._program(request.completion, tests)
        if program is None:
            return Verdict(reward=0.0, extracted=None, reason="no program")
        tally = _Tally()
        deadline = time.monotonic() + self._options.wall_s
        for case in tests.stdin:
            outcome = self._run(sandbox.Program(source=program, stdin=case.given), deadline)
            right = outcome.problem is None and _lines(outcome.stdout) == _lines(case.wanted)
            tally.note(right, outcome.problem or "another output than wanted")
        if tests.calls or tests.asserts:
            self._in_scope(program, tests, tally, deadline)
        reward = tally.passed / tests.count if self._options.partial else float(tally.passed == tests.count)
        reason = f"{tally.passed} of {tests.count} tests pass"
        if tally.problem is not None:
            reason += f"; first failure: {tally.problem}"
        return Verdict(reward=reward, extracted=program[:200], reason=reason)

    def _in_scope(self, program: str, tests: Tests, tally: _Tally, deadline: float) -> None:
        calls = [(case.function, case.arguments) for case in tests.calls]
        if calls:
            outcome = self._run(sandbox.Program(source=program, calls=calls), deadline)
            for index, case in enumerate(tests.calls):
                result = outcome.values[index] if index < len(outcome.values) else {}
                right = "value" in result and _same(result["value"], case.value)
                problem = result.get("error") or outcome.problem or f"{case.function} returns another value than wanted"
                tally.note(right, str(problem))
        if tests.asserts:
            outcome = self._run(sandbox.Program(source=program, asserts=tests.asserts), deadline)
            for index in range(len(tests.asserts)):
                tally.note(index < outcome.passed, outcome.problem or "an assert was not reached")

    def _run(self, program: sandbox.Program, deadline: float) -> sandbox.Outcome:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return sandbox.Outcome(stdout="", values=(), passed=0, problem="no time left")
        limits = sandbox.SandboxLimits(
            cpu_s=self._options.cpu_s,
            wall_s=left_s,
            memory_bytes=self._options.memory_bytes,
            rlimits_suffice=self._rlimits_suffice,
        )
        return sandbox.run(program, limits)

    def _program(self, completion: str, tests: Tests) -> str | None:
        completion = _behind_thought(completion.replace("\r\n", "\n"))
        blocks = [
            (match["language"].lower(), match["body"]) for match in _FENCE.finditer(completion) if match["closed"]
        ]
        # A block without a language is the program only where no block says that it is Python: it may show the output.
        programs = [body for language, body in blocks if language in _PYTHON] or [
            body for language, body in blocks if not language
        ]
        if programs:
            # A block that shows how the functions are called may follow the one that defines them.
            defining = [body for body in programs if _defines(body, tests)]
            program = (defining or programs)[-1]
            return textwrap.dedent(program) if program.strip() else None
        if self._options.fence == "required" or "```" in completion:
            return None
        return completion if completion.strip() else None


@lru_cache(maxsize=256)
def read_tests(answer: str) -> Tests:
    """The tests in a reference answer. Raises ScoreError."""
    try:
        tests = Tests.model_validate(json.loads(answer))
    except (ValueError, RecursionError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ScoreError(f"The reference answer {answer!r:.80} does not hold tests as JSON: {why}.") from error
    if not tests.count:
        raise ScoreError("The reference answer holds no test.")
    return tests


def _behind_thought(text: str) -> str:
    """What follows the thought at the start, "" if it never ends. A program may hold the tags itself.

    The `</think>` of a thought that the chat template began stands before the first fence, or on a line of its own.
    """
    before, ended, rest = text.partition("</think>")
    if before.lstrip().startswith("<think>"):
        return rest
    if not ended or ("```" in before and not before.endswith("\n")):
        return text
    return rest if "```" in rest or rest.startswith("\n") else text


def _defines(program: str, tests: Tests) -> bool:
    """Whether a function that the tests call seems to be defined in `program`."""
    wanted = {case.function for case in tests.calls}.union(*(_CALLED.findall(one) for one in tests.asserts))
    return not wanted.isdisjoint(match[1] or match[2] for match in _DEFINED.finditer(program))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same(value: object, wanted: object) -> bool:
    """Equal as JSON: unlike Python's ==, true is not 1; a float may differ in its last digits."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        if isinstance(value, int) and isinstance(wanted, int):
            return value == wanted
        try:
            return value == wanted or abs(value - wanted) <= 1e-9 * abs(wanted)
        except OverflowError:  # an integer beyond every float
            return False
    if isinstance(value, list) and isinstance(wanted, list):
        ours, theirs = cast("list[object]", value), cast("list[object]", wanted)
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(value, dict) and isinstance(wanted, dict):
        mine, yours = cast("dict[str, object]", value), cast("dict[str, object]", wanted)
        return mine.keys() == yours.keys() and all(_same(mine[key], yours[key]) for key in mine)
    return type(value) is type(wanted) and value == wanted

"""The graders `exact`, `regex`, `format` and `python`."""

import numpy as np
import pytest

from services.reward.graders import Permissions, build
from services.reward.graders.base import Verdict
from services.reward.graders.python_callable import PythonGrader, PythonOptions
from services.reward.scorer import ScoreRequest
from services.reward.spec import GraderSpec
from services.runtime.errors import EngineError


def grade(
    name: str, answer: str, completion: str, permissions: Permissions | None = None, **options: object
) -> Verdict:
    grader = build([GraderSpec(name=name, options=options)], permissions or Permissions())[0].grader
    return grader.grade(ScoreRequest(prompt="the prompt", answer=answer, completion=completion))


@pytest.mark.parametrize(
    ("answer", "completion", "options", "reward"),
    [
        ("1234", "1234", {}, 1),
        ("1234", " 1234\n", {}, 1),
        ("1234", " 1234", {"strip": False}, 0),
        ("Yes", "yes", {}, 0),
        ("Yes", "yes", {"ignore_case": True}, 1),
        ("1234", "1234.0", {}, 0),
        ("", "", {}, 0),
    ],
)
def test_exact_compares_text(answer: str, completion: str, options: dict[str, object], reward: float) -> None:
    assert grade("exact", answer, completion, **options).reward == reward


@pytest.mark.parametrize(
    ("answer", "completion", "options", "reward"),
    [
        ("7", "a=3 a=7", {"pattern": r"a=(\d+)"}, 1),
        ("3", "a=3 a=7", {"pattern": r"a=(\d+)"}, 0),
        ("7", "b", {"pattern": r"a=(\d+)"}, 0),
        ("", "a=", {"pattern": r"a=(\d*)"}, 0),
        ("unused", "DONE", {"pattern": "done", "ignore_case": True}, 1),
        ("unused", "DONE", {"pattern": "done"}, 0),
        ("unused", "well done", {"pattern": "done", "whole": True}, 0),
        ("YES", "it is yes", {"pattern": "is (.*)", "ignore_case": True}, 1),
    ],
)
def test_regex_matches_or_extracts(answer: str, completion: str, options: dict[str, object], reward: float) -> None:
    assert grade("regex", answer, completion, **options).reward == reward


@pytest.mark.parametrize(
    ("completion", "options", "reward"),
    [
        ("so \\boxed{7}", {}, 1),
        ("so \\boxed{}", {}, 0),
        ("\\boxed{7} \\boxed{7}", {}, 0),
        ("\\boxed{7", {}, 0),
        ("x\n#### 7", {"require": "hash"}, 1),
        ("x\n#### 7\nmore", {"require": "hash"}, 0),
        ("x\n####", {"require": "hash"}, 0),
        ("<think>a</think><answer>b</answer>", {"require": "think_answer"}, 1),
        ("<think>a</think><answer></answer>", {"require": "think_answer"}, 0),
        ("<think>a</think><think>c</think><answer>b</answer>", {"require": "think_answer"}, 0),
        ("b", {"require": "think_answer"}, 0),
        ("abc", {"require": "pattern", "pattern": "a.c"}, 1),
        ("abcd", {"require": "pattern", "pattern": "a.c"}, 0),
        ("abcd", {"require": "pattern"}, 0),
    ],
)
def test_format_looks_at_the_form_only(completion: str, options: dict[str, object], reward: float) -> None:
    assert grade("format", "7", completion, **options).reward == reward


def half(
    prompt: str, completion: str, answer: str, metadata: dict[str, object], bonus: float = 0.0
) -> tuple[float, str]:
    assert (prompt, answer, metadata) == ("the prompt", "7", {})
    return 0.5 * len(completion) + bonus, "half a point per character"


def returns(value: object, **_: object) -> object:
    return {"float32": np.float32(0.5), "bool": np.True_}.get(str(value), value)


def called(name: str, **arguments: object) -> Verdict:
    grader = PythonGrader(PythonOptions(callable=f"{__name__}:{name}", arguments=arguments), (__name__,))
    grader.load()
    return grader.grade(ScoreRequest(prompt="the prompt", answer="7", completion="abc"))


def test_python_calls_a_function_by_keywords() -> None:
    assert called("half", bonus=2.0) == Verdict(reward=3.5, extracted=None, reason="half a point per character")


@pytest.mark.parametrize(("value", "reward"), [(True, 1.0), (3, 3.0), ("float32", 0.5), ("bool", 1.0)])
def test_python_takes_every_kind_of_number(value: object, reward: float) -> None:
    assert called("returns", value=value).reward == reward


@pytest.mark.parametrize("value", [None, "1.0", [1.0], float("nan"), float("-inf")])
def test_python_refuses_what_is_no_finite_number(value: object) -> None:
    with pytest.raises(TypeError, match=r"returned .*, not a finite number"):
        called("returns", value=value)


def test_python_says_how_many_values_there_were_instead_of_two() -> None:
    with pytest.raises(TypeError, match="returned 3 values"):
        called("three")


def three(**_: object) -> tuple[float, str, str]:
    return 1.0, "good", "better"


def test_python_names_a_callable_that_is_not_there() -> None:
    with pytest.raises(EngineError, match="cannot be imported"):
        called("absent")

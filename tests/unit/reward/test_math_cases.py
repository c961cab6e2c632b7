"""The grader `math` on every case of cases.jsonl: reward 1 only for a verified answer."""

import json
from pathlib import Path

import pytest

from services.reward.graders import Permissions, build
from services.reward.scorer import ScoreRequest
from services.reward.spec import parse_graders

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").read_text().splitlines()]


def name(case: dict[str, object]) -> str:
    return ascii(f"{case['answer']}, {case['completion']}: {case['why']}")[:120]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_reward_is_what_the_table_says(case: dict[str, object]) -> None:
    graders = build(parse_graders({"name": "math", "options": case.get("options", {})}), Permissions())
    request = ScoreRequest(
        prompt=str(case.get("prompt", "")), answer=str(case["answer"]), completion=str(case["completion"])
    )
    verdict = graders[0].grader.grade(request)
    assert verdict.reward == case["reward"], f"{case['why']}; got {verdict}"
    assert verdict.reason


def test_a_sentence_is_not_multiplied_out() -> None:
    """As a product of its letters this one takes most of the time that an answer has."""
    grader = build(parse_graders("math"), Permissions())[0].grader
    request = ScoreRequest(prompt="", answer="3\\sqrt{2}", completion="So the distance is 3 units and a half.")
    assert grader.grade(request).reason == "a sentence"


def test_the_table_has_what_was_promised() -> None:
    assert len(CASES) >= 150
    assert sum(case["reward"] == 0 for case in CASES) >= 80
    assert len(
        {json.dumps([case.get(key) for key in ("answer", "completion", "options", "prompt")]) for case in CASES}
    ) == len(CASES)
    assert all(case["why"] for case in CASES)

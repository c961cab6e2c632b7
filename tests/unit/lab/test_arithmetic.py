"""The arithmetic task: right answers, fixed by seed, and splits that never meet."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.lab.arithmetic import (
    Difficulty,
    Operator,
    Problem,
    Split,
    distinct_problems,
    problems,
    write_dataset,
)
from services.runtime.errors import ConfigError

_EVERY_OPERATOR = Difficulty(min_digits=1, max_digits=4, operators=tuple(Operator))


@given(seed=st.integers(), split=st.sampled_from(Split))
def test_every_answer_is_what_python_says(seed: int, split: Split) -> None:
    for problem in itertools.islice(problems(split, seed=seed, difficulty=_EVERY_OPERATOR), 20):
        # The prompt has decimal digits, one operator and "=" only.
        assert str(eval(problem.prompt.removesuffix("="))) == problem.answer
        assert problem.split is split


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    one, again, other = (
        distinct_problems(Split.TRAIN, count=100, seed=seed, difficulty=Difficulty()) for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


def test_no_seed_puts_a_held_out_problem_into_training() -> None:
    difficulty = Difficulty(min_digits=1, max_digits=2)
    held_out = distinct_problems(Split.HELD_OUT, count=400, seed=1, difficulty=difficulty)
    train = distinct_problems(Split.TRAIN, count=8000, seed=2, difficulty=difficulty)
    assert not set(held_out) & set(train)


def test_about_a_sixteenth_of_all_problems_is_held_out() -> None:
    held_out = sum(
        Problem(prompt=f"{a}+{b}=", answer="").split is Split.HELD_OUT for a in range(100) for b in range(100)
    )
    assert 500 < held_out < 750


def test_operands_have_the_digits_asked_for() -> None:
    difficulty = Difficulty(min_digits=2, max_digits=3)
    drawn = list(itertools.islice(problems(Split.TRAIN, seed=0, difficulty=difficulty), 500))
    lengths = {len(operand) for problem in drawn for operand in problem.prompt.removesuffix("=").split("+")}
    assert lengths == {2, 3}


def test_a_data_set_is_json_lines_of_distinct_prompts(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    written = write_dataset(path, Split.TRAIN, 50, 7)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"prompt": problem.prompt, "answer": problem.answer} for problem in written]
    assert len({row["prompt"] for row in rows}) == 50
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.jsonl"]


def test_asking_for_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has only .* held_out problems"):
        distinct_problems(Split.HELD_OUT, count=100, seed=0, difficulty=Difficulty(min_digits=1, max_digits=1))


@pytest.mark.parametrize(("low", "high"), [(0, 2), (3, 2), (1, 19)])
def test_impossible_digits_are_refused(low: int, high: int) -> None:
    with pytest.raises(ConfigError, match="min_digits"):
        Difficulty(min_digits=low, max_digits=high)


def test_no_operator_and_no_problem_are_refused() -> None:
    with pytest.raises(ConfigError, match="operators is empty"):
        Difficulty(operators=())
    with pytest.raises(ConfigError, match="count"):
        distinct_problems(Split.TRAIN, count=0, seed=0, difficulty=Difficulty())

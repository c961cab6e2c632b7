"""Sums as tokens, and their grading."""

import pytest
import torch

from services.lab.sum_tasks import BLANK, EOS, PAD, THEN, ZERO, SumTask, TaskName


def text(ids: list[int]) -> str:
    names = {PAD: "", EOS: "$", BLANK: "_", 13: "+", 14: "=", THEN: ">"}
    return "".join(names.get(token, str(token - ZERO)) for token in ids)


@pytest.mark.parametrize("name", list(TaskName))
def test_prompts_and_answers_are_the_sum_they_say(name: TaskName) -> None:
    task = SumTask(name=name, columns=4)
    problems = task.draw(200, seed=3)
    for prompt, answer, total in zip(
        problems.prompts_PL.tolist(), problems.answers_PT.tolist(), problems.sums_P.tolist(), strict=True
    ):
        numbers = [int(text(prompt[side::2])[::-1].lstrip("_")) for side in (0, 1)]
        assert sum(numbers) == total
        assert int(text(answer).rstrip("$").split(">")[-1][::-1]) == total


@pytest.mark.parametrize("name", list(TaskName))
def test_the_supervised_answer_is_rewarded_and_a_changed_one_is_not(name: TaskName) -> None:
    task = SumTask(name=name, columns=3)
    problems = task.draw(50, seed=1)
    length_B = (problems.answers_PT != PAD).sum(1)
    assert task.rewards(problems, problems.answers_PT, length_B).tolist() == [1.0] * 50
    wrong_BT = problems.answers_PT.clone()
    last_B = length_B - (2 if task.stops_at_end else 1)
    digit_B = wrong_BT.gather(1, last_B[:, None])
    wrong_BT.scatter_(1, last_B[:, None], ZERO + (digit_B - ZERO + 1) % 10)
    assert task.rewards(problems, wrong_BT, length_B).tolist() == [0.0] * 50


def test_the_working_may_be_wrong_if_the_sum_is_right() -> None:
    task = SumTask(name=TaskName.WORKED, columns=2)
    problems = task.draw(1, seed=1)
    ids = [*([ZERO] * 5), THEN, *(ZERO + int(d) for d in reversed(str(int(problems.sums_P[0])))), EOS]
    tokens_BT = torch.tensor([ids])
    assert task.rewards(problems, tokens_BT, torch.tensor([len(ids)])).tolist() == [1.0]
    assert task.rewards(problems, tokens_BT[:, :-1], torch.tensor([len(ids) - 1])).tolist() == [0.0]


def test_lengths_vary_where_they_should() -> None:
    fixed = SumTask(name=TaskName.FIXED).draw(300, seed=2).answers_PT
    assert bool((fixed != PAD).all())
    lengths = (SumTask(name=TaskName.VARIABLE).draw(300, seed=2).answers_PT != PAD).sum(1)
    assert set(lengths.tolist()) == {2, 3, 4, 5, 6, 7}
    worked = SumTask(name=TaskName.WORKED)
    assert int((worked.draw(300, seed=2).answers_PT != PAD).sum(1).max()) <= worked.max_tokens


def test_the_same_seed_gives_the_same_problems() -> None:
    task = SumTask(name=TaskName.VARIABLE)
    assert torch.equal(task.draw(20, seed=5).prompts_PL, task.draw(20, seed=5).prompts_PL)
    assert not torch.equal(task.draw(20, seed=5).prompts_PL, task.draw(20, seed=6).prompts_PL)

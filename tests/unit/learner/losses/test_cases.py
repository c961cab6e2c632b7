"""`heterorl loss`: what it prints, and what it says of bad input."""

import json
from pathlib import Path

import pytest

from services.cli import main
from services.learner.losses.settings import LossName
from tests.unit.learner.losses import oracle
from tests.unit.learner.losses.building import random_case

GOOD: dict[str, object] = {
    "name": "sample",
    "loss": "gepo",
    "learner_logprobs": [[-0.31], [-0.42], [-0.28], [-0.55]],
    "sampler_logprobs": [[-0.30], [-0.45], [-0.33], [-0.50]],
    "mask": [[1], [1], [1], [1]],
    "rewards": [1, 0, 1, 0],
    "group_size": 4,
    "options": {},
}


def write(folder: Path, content: object) -> str:
    path = folder / "cases.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_json_holds_one_object_per_case_and_agrees_with_the_oracle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases, expected = [], []
    for name in LossName:
        case = random_case(name.value, 41)
        order = sorted(range(len(case.groups)), key=lambda i: case.groups[i])
        pick = lambda values: [values[i] for i in order]  # noqa: E731, B023
        case.logp, case.logq, case.rewards = pick(case.logp), pick(case.logq), pick(case.rewards)
        case.groups, case.prox, case.staleness = pick(case.groups), None, None
        expected.append(oracle.evaluate(case))
        cases.append(
            {
                "name": f"a {name}",
                "loss": name.value,
                "learner_logprobs": [[*row, None] for row in case.logp],
                "sampler_logprobs": [[*row, 3.0] for row in case.logq],
                "mask": [[1] * len(row) + [0] for row in case.logp],
                "rewards": case.rewards,
                "group_size": 4,
            }
        )
    assert main(["loss", "--cases", write(tmp_path, cases), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r["loss_name"] for r in results] == [name.value for name in LossName]
    for result, answer in zip(results, expected, strict=True):
        assert result["loss"] == pytest.approx(answer.loss, rel=1e-9, abs=1e-12)
        assert result["advantages"] == pytest.approx(answer.advantages, rel=1e-9, abs=1e-12)
        for row, wanted in zip(result["gradient"], answer.gradient, strict=True):
            assert row == pytest.approx([*wanted, 0.0], rel=1e-9, abs=1e-12)
        for weight, wanted in zip(result["importance_weights"], answer.weights, strict=True):
            if isinstance(wanted, list):
                assert weight[-1] is None
                assert weight[:-1] == pytest.approx(wanted, rel=1e-9)
            else:
                assert weight == pytest.approx(wanted, rel=1e-9)


def test_staleness_moves_the_denominator_of_gepo_fresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def weights(**change: object) -> list[float]:
        case = {**GOOD, **change}
        assert main(["loss", "--cases", write(tmp_path, case), "--json"]) == 0
        (result,) = json.loads(capsys.readouterr().out)
        return result["importance_weights"]

    own = weights(loss="gspo")
    assert weights(loss="gepo_fresh", staleness=[0, 0, 0, 0]) == pytest.approx(own, rel=1e-12)
    largest = weights(loss="gepo_fresh")
    assert weights(loss="gepo_fresh", staleness=[0, 400, 0, 400]) == pytest.approx(
        [own[0], largest[1], own[2], largest[3]], rel=1e-12
    )
    assert all(big <= one * (1 + 1e-12) for big, one in zip(largest, own, strict=True))


def test_text_names_loss_clip_share_weights_and_gradient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loss", "--cases", write(tmp_path, GOOD)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sample: gepo\n")
    assert "weight    1.077742936" in text
    assert "clip share  0" in text


def test_rows_that_take_no_part_are_named_with_their_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = {
        **GOOD,
        "learner_logprobs": [[-0.31], [-0.42], [-0.28], [], [float("nan")], [-1.0]],
        "sampler_logprobs": [[float("nan")], [-0.45], [float("-inf")], [], [-1.0], [-1.0]],
        "mask": [[1], [1], [1], [], [1], [1]],
        "rewards": [1, 0, 1, 0, 0, 1],
        "group_size": 6,
        "overlong": [0, 0, 0, 0, 0, 1],
    }
    assert main(["loss", "--cases", write(tmp_path, case), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [(entry["row"], entry["reason"]) for entry in result["excluded"]] == [
        (0, "sampler_nonfinite"),
        (2, "sampler_nonfinite"),
        (3, "empty"),
        (4, "learner_nonfinite"),
        (5, "overlong"),
    ]
    assert [weight is None for weight in result["importance_weights"]] == [True, False, True, True, True, True]
    assert main(["loss", "--cases", write(tmp_path, case)]) == 0
    assert "left out: overlong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"loss": "gepoo"}, "case 'sample': unknown loss 'gepoo': nearest names are gepo, "),
        ({"loss": 3}, '"loss" must be a string'),
        ({"group_size": 1}, "with group_size 1 the advantage is undefined"),
        ({"group_size": 3}, "4 rows are not a multiple of group_size 3: a group is cut in two"),
        ({"group_size": "4"}, '"group_size" must be a whole number'),
        ({"staleness": [1, 0]}, '"staleness" has 2 values but there are 4 rows'),
        ({"staleness": [1, 0, -1, 0]}, '"staleness" must hold versions, 0 or more'),
        ({"staleness": 3}, '"staleness" must be a list'),
        ({"rewards": [1, 0]}, '"rewards" has 2 values but there are 4 rows'),
        ({"rewards": [1, 0, "x", 0]}, '"rewards" holds "x" where a number must stand'),
        ({"rewards": [10**400, 0, 0, 0]}, "too large"),
        ({"rewards": [1e308, 0, 0, 0]}, "not finite"),
        ({"rewards": [2, 0, 0, 0], "options": {"advantage": "bnpo"}}, "rewards between 0 and 1"),
        ({"mask": [[1], [1]]}, '"mask" has 2 rows but "learner_logprobs" has 4'),
        ({"mask": [[1], [1], [1], [2]]}, '"mask" may hold only 0, 1'),
        ({"sampler_logprobs": [[-1, -2], [-1], [-1], [-1]]}, 'row 0 of "sampler_logprobs" has 2 tokens'),
        (
            {"sampler_logprobs": [[-1], [0.5], [-1], [-1]]},
            '"sampler_logprobs" row 1, token 0 is 0.5: a log-prob cannot',
        ),
        ({"learner_logprobs": [[1e-9], [-1], [-1], [-1]]}, "a log-prob cannot be above 0"),
        ({"learner_logprobs": "no"}, '"learner_logprobs" must be a list'),
        ({"learner_logprobs": [], "sampler_logprobs": [], "mask": [], "rewards": []}, "there are no rows"),
        ({"options": {"clip_hgih": 0.1}}, 'unknown option "clip_hgih": nearest'),
        ({"options": {"name": "gspo"}}, 'unknown option "name"'),
        ({"options": {"clip_low": -1}}, 'option "clip_low": input should be greater than or equal to 0'),
        ({"options": {"aggregation": "mean"}}, "option \"aggregation\": input should be 'seq_mean'"),
        ({"options": [1]}, '"options" must be an object'),
        ({"options": {"kl_beta": 1, "kl_target": "reference"}}, "needs the reference model's log-probs"),
        ({"reward": [1]}, 'unknown key "reward": nearest'),
        ({"name": 5}, '"name" must be a string'),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], sentence: str
) -> None:
    assert main(["loss", "--cases", write(tmp_path, [{**GOOD, "name": "first"}, {**GOOD, **change}]), "--json"]) == 65
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("heterorl loss: case ")
    assert sentence in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no case"),
        ("[3]", "case 1 is not a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ("[" + "1" * 5000 + "]", "is not JSON"),
        ("\ufeff[]", "holds no case"),
        ('{"loss": "gepo"}', 'case 1: "learner_logprobs" is missing'),
    ],
)
def test_a_file_without_cases_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, sentence: str
) -> None:
    assert main(["loss", "--cases", write(tmp_path, content)]) == 65
    assert sentence in capsys.readouterr().err


def test_a_missing_file_has_its_own_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loss", "--cases", str(tmp_path / "none.json")]) == 66
    assert "there is no file" in capsys.readouterr().err
    assert main(["loss", "--cases", str(tmp_path)]) == 65


def test_a_file_that_is_not_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cases.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert main(["loss", "--cases", str(path)]) == 65
    assert "cannot be read" in capsys.readouterr().err

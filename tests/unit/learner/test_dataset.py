import json
from pathlib import Path

import pytest

from services.learner.dataset import Dataset, PromptOrder
from services.runtime.errors import BadInputError, InputMissingError


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"prompt": "1 + 1?", "answer": "2"}, "2"),
        ({"question": "1 + 1?", "answer": "One and one is <<1+1=2>>2.\n#### 2"}, "One and one is <<1+1=2>>2.\n#### 2"),
        ({"problem": "1 + 1?", "solution": "It is $\\boxed{2}$."}, "It is $\\boxed{2}$."),
        ({"prompt": "1 + 1?", "answer": 2}, "2"),
    ],
)
def test_each_layout_gives_the_prompt_and_its_whole_answer(tmp_path: Path, record: object, answer: str) -> None:
    prompt = Dataset.load(write(tmp_path, json.dumps(record))).prompts[0]
    assert (prompt.text, prompt.answer, prompt.metadata_json) == ("1 + 1?", answer, "")


def test_keys_can_be_named_and_the_rest_is_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"q": "x?", "gold": "y", "answer": "no", "level": 3}))
    prompt = Dataset.load(path, prompt_key="q", answer_key="gold").prompts[0]
    assert (prompt.text, prompt.answer) == ("x?", "y")
    assert json.loads(prompt.metadata_json) == {"answer": "no", "level": 3}


def test_ids_are_stable_unique_and_change_with_the_content(tmp_path: Path) -> None:
    same = json.dumps({"prompt": "a", "answer": "b"})
    first = Dataset.load(write(tmp_path, same, "", same))
    again = Dataset.load(write(tmp_path, b"\xef\xbb\xbf" + same.encode(), same + "\r"))
    other = Dataset.load(write(tmp_path, same, json.dumps({"prompt": "a", "answer": "c"})))
    ids = [prompt.prompt_id for prompt in first.prompts]
    assert len(set(ids)) == 2
    assert ids == [prompt.prompt_id for prompt in again.prompts]
    assert first.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{not json", "not JSON"),
        ("[1]", "a JSON object is needed"),
        ('{"prompt": "x"}', '"answer" is missing'),
        ('{"prompt": "", "answer": "x"}', "not empty"),
        ('{"prompt": ["x"], "answer": "x"}', "messages are not read"),
        ('{"prompt": "x", "answer": true}', "must be text"),
        ('{"prompt": "x", "answer": NaN}', "must be text"),
        ('{"prompt": "x", "answer": ' + "1" * 5000 + "}", "not JSON"),
        ('{"prompt": "\\ud800", "answer": "x"}', "not valid Unicode"),
        (b"\xff\xfe", "not UTF-8"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({"prompt": "x", "answer": "y", "tests": "z" * (2 << 20)}), "at most 2097152 fit a message"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str | bytes, what: str) -> None:
    path = write(tmp_path, '{"prompt": "x", "answer": "y"}', "", line)
    with pytest.raises(BadInputError, match=rf"data.jsonl, line 3: .*{what}"):
        Dataset.load(path)


def test_a_file_without_prompts_without_known_keys_or_missing_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="holds no prompts"):
        Dataset.load(write(tmp_path, "", "  "))
    with pytest.raises(BadInputError, match=r"line 1: .*data.prompt_key"):
        Dataset.load(write(tmp_path, '{"text": "x"}'))
    with pytest.raises(InputMissingError, match="no data set"):
        Dataset.load(tmp_path / "none.jsonl")
    with pytest.raises(BadInputError, match="cannot be read"):
        Dataset.load(tmp_path)


def test_every_pass_holds_each_prompt_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    data = Dataset.load(write(tmp_path, *(json.dumps({"prompt": str(n), "answer": "x"}) for n in range(20))))
    order, same, other = PromptOrder(data, 1, True), PromptOrder(data, 1, True), PromptOrder(data, 2, True)
    passes = [[order.at(turn * 20 + place).text for place in range(20)] for turn in range(3)]
    assert all(sorted(one) == sorted(prompt.text for prompt in data.prompts) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [same.at(n) for n in range(39, -1, -1)] == [order.at(n) for n in range(39, -1, -1)]
    assert [other.at(n).text for n in range(20)] != passes[0]
    straight = PromptOrder(data, 1, False)
    assert [straight.at(n).text for n in range(40)] == [prompt.text for prompt in data.prompts] * 2

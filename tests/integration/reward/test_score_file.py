"""`heterorl reward score` as a person runs it: a process, its output, its exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [
    {"completion": "so \\boxed{7}", "answer": "7"},
    {"completion": "\\boxed{10^{10^{10}}}", "answer": "7"},
    {"completion": "#### 1,234", "answer": "reasoning #### 1234"},
    {"completion": "\ud800", "answer": "7"},
    {"completion": "\\boxed{5}", "answer": "5", "prompt": "Write \\boxed{4}"},
    {"completion": "", "answer": "0"},
]


def reward(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", "reward", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_one_json_line_per_case_in_order(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text("\n".join(json.dumps(case) for case in CASES) + "\n\n")
    ended = reward("score", "--cases", str(file), "--json", "--workers", "2")
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line["reward"] for line in lines] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert [line["extracted"] for line in lines[:3]] == ["7", "10^{10^{10}}", "1,234"]
    assert all(set(line) == {"reward", "extracted", "reason", "seconds"} for line in lines)


def test_graders_may_be_given_as_json_and_the_output_may_be_a_table(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(CASES[0]))
    graders = '[{"name": "math"}, {"name": "format", "weight": 0.5}]'
    ended = reward("score", "--cases", str(file), "--graders", graders)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("   1.500  7")


def test_what_a_grader_prints_is_no_line_of_the_output(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text('{"completion": "print", "answer": ""}')
    module = f"{__package__}.graders_of_tests"
    graders = json.dumps({"name": "python", "options": {"callable": f"{module}:obey"}})
    ended = reward("score", "--cases", str(file), "--json", "--graders", graders, "--allow-python", module)
    assert [json.loads(line)["reward"] for line in ended.stdout.splitlines()] == [1.0]
    assert ended.stderr == '{"reward": 9}\n'


@pytest.mark.parametrize(
    ("text", "code", "sentence"),
    [
        ('{"completion": "7", "answer": "7"}\n{"completion"', 65, "Line 2 of "),
        ('{"completion": "7"}', 65, "needs 'answer' as a text"),
        ('{"completion": 7, "answer": "7"}', 65, "needs 'completion' as a text"),
        ("[1]", 65, "is not an object"),
        ("\xff\xfe", 65, "Line 1 of "),
        ("[" * 100_000, 65, "Line 1 of "),
        (
            '{"completion": "7", "answer": "7"}\n\n{"completion": "7", "answer": ""}',
            65,
            "Line 3: The reference answer is empty",
        ),
    ],
)
def test_a_bad_line_is_one_sentence_with_its_number(tmp_path: Path, text: str, code: int, sentence: str) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_bytes(text.encode("latin-1"))
    ended = reward("score", "--cases", str(file), "--json")
    assert ended.returncode == code
    assert sentence in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("score", "--cases", "/nowhere/cases.jsonl"), 66, "There is no file"),
        (("score", "--cases", "/nowhere/cases.jsonl", "--graders", "mth"), 65, "did you mean math"),
        (("score",), 2, "--cases"),
        ((), 2, "--listen"),
        (("serve", "--listen", "nonsense"), 2, "nonsense"),
        (("serve", "--listen", "0.0.0.0:0"), 77, "loopback"),
        (("serve", "--listen", "unix:///nowhere/r.sock"), 69, "/nowhere/r.sock"),
        (("serve", "--listen", "unix:///tmp/r.sock", "--workers", "0"), 2, "above 0"),
    ],
)
def test_wrong_use_has_its_documented_exit_code(words: tuple[str, ...], code: int, sentence: str) -> None:
    ended = reward(*words)
    assert ended.returncode == code
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr

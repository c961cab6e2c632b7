import importlib.util
import os
import subprocess
import sys

import pytest

from services.cli import VERBS, build_parser, main

HEAVY = {"torch", "transformers", "grpc", "numpy", "matplotlib", "rich", "sympy", "vllm"}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_its_file_and_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]):
    assert importlib.util.find_spec(f"services.commands.{verb}") is not None
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert VERBS[verb][1:20] in capsys.readouterr().out


def test_no_verb_imports_anything_heavy_before_its_arguments_are_parsed():
    code = "import sys; from services.cli import *\nfor verb in VERBS: build_parser(verb)\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "argparse" in modules
    assert HEAVY.isdisjoint(modules)


def test_an_unknown_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["lerner"])
    assert end.value.code == 2
    assert "invalid choice: 'lerner'" in capsys.readouterr().err


def test_an_error_of_ours_becomes_one_sentence_and_its_exit_code(capsys: pytest.CaptureFixture[str], tmp_path):
    assert main(["report", str(tmp_path)]) == 66
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("heterorl report: ")
    assert captured.err.count("\n") == 1


def test_a_sentence_brings_no_control_characters_to_a_terminal(capsys: pytest.CaptureFixture[str]):
    assert main(["report", "no\x1b[2J\udcff\u202e"]) == 66
    assert "no\\x1b[2J\\udcff\\u202e" in capsys.readouterr().err


def test_words_that_no_verb_knows_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["report", "folder", "--loud"])
    assert end.value.code == 2
    assert "--loud" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--tls", ""],
        ["report", ""],
        ["learner", "-c", ""],
        ["weights", "verify", ""],
        ["lab", "theory", "--out", ""],
        ["demo", "--out", ""],
    ],
)
def test_an_empty_path_is_not_the_current_folder(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "the path is empty" in capsys.readouterr().err


def test_the_parser_names_every_verb():
    assert all(verb in build_parser(None).format_help() for verb in VERBS)


def test_a_reader_that_leaves_ends_the_command_without_a_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "services.cli", "config", "default", "learner"],
        stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


PRINTING = [sys.executable, "-m", "services.cli", "config", "default", "learner"]


def test_an_output_that_cannot_be_written_is_one_sentence():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(PRINTING, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 74
    assert "cannot write: No space left" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_output_that_is_closed_is_no_error():
    ended = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *PRINTING], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_terminal_that_lacks_a_character_is_no_error(tmp_path):
    code = "import sys; from services.cli import main; sys.exit(main(['report', chr(0x2192) + chr(0xdcff)]))"
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "latin-1:strict",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert ended.returncode == 66
    assert b"\\u2192\\udcff" in ended.stderr


def test_too_little_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import services.commands.report as report

    def run(_: object) -> int:
        raise MemoryError

    monkeypatch.setattr(report, "run", run)
    assert main(["report", "x"]) == 75
    assert (
        capsys.readouterr().err == "heterorl report: there is not enough memory: free some, or use a larger machine\n"
    )


@pytest.mark.parametrize(("verb", "verbosity"), [("status", "ERROR"), ("relay", None)])
def test_only_servers_keep_grpcs_own_lines(verb: str, verbosity: str | None, monkeypatch: pytest.MonkeyPatch):
    """A client says in its sentence why a handshake failed; at a server nothing else tells of it."""
    monkeypatch.setattr(os, "environ", {key: os.environ[key] for key in os.environ if key != "GRPC_VERBOSITY"})
    assert main([verb, *(["--listen", "nowhere"] if verb == "relay" else [])]) == 2
    assert os.environ.get("GRPC_VERBOSITY") == verbosity

"""`heterorl pki`, through the command line's own main."""

from pathlib import Path

import pytest

from services.cli import main


def test_dev_makes_the_folder_and_a_second_run_says_that_nothing_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["pki", "dev", str(tmp_path / "pki"), "--sampler", "eu-1", "--sampler", "us-1", "--host", "10.0.0.1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("made ") == 7
    assert f"{tmp_path}/pki/us-1.pem  until " in out
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("kept ") == 7
    assert "everything was valid already: nothing was changed" in out


def test_without_samplers_a_later_run_means_those_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A relay's host is added, or certificates are renewed: no credentials of samplers that nobody asked for."""
    words = ["pki", "dev", str(tmp_path)]
    assert main([*words, "--sampler", "eu-1", "--sampler", "us-1"]) == 0
    (tmp_path / "us-1-key.pem").unlink()
    capsys.readouterr()
    assert main([*words, "--host", "relay.example.org"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert {line.split()[1].removeprefix(f"{tmp_path}/"): line.split()[0] for line in said[:-1]} == {
        **dict.fromkeys(["ca.pem", "monitor.pem", "admin.pem", "eu-1.pem"], "kept"),
        **dict.fromkeys(["learner.pem", "relay.pem", "us-1.pem"], "renewed"),
    }


def test_a_new_folder_is_for_two_samplers(tmp_path: Path):
    assert main(["pki", "dev", str(tmp_path)]) == 0
    assert {"sampler-1.pem", "sampler-2.pem"} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--sampler", "../x"], 65, "'../x' is no id"),
        (["--sampler", "a", "--sampler", "a"], 2, "two samplers have the same name"),
        (["--sampler", "learner"], 2, "another file has that name"),
        (["--host", "https://x"], 2, "'https://x' is not a host name or address"),
    ],
)
def test_wrong_names_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, reason: str
):
    assert main(["pki", "dev", str(tmp_path), *words]) == code
    err = capsys.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1

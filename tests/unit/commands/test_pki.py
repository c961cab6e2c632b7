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

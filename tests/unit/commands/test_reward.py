import pytest

from services.cli import main


@pytest.mark.parametrize("limit", ["--workers=0", "--cpu-s=nan", "--wall-s=inf", "--memory-bytes=-1"])
def test_a_limit_that_is_none_is_a_usage_error(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "score", "--cases", "absent.jsonl", limit]) == 2
    assert "must be above 0, and finite" in capsys.readouterr().err

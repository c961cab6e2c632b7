import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from services.monitor.plots import learning_curve, staleness
from services.monitor.report import read_run, write_report
from services.runtime.errors import BadInputError, InputMissingError, UsageError

SUMMARY = {
    "steps": 3,
    "wall_s": 12.5,
    "loss": "gepo",
    "accuracy_start": 0.3,
    "accuracy_end": 0.7,
    "max_staleness": 8,
    "staleness_max": 2,
    "staleness_histogram": {"0": 4, "1": 5, "2": 3},
    "groups_trained": 12,
    "groups_acknowledged": 15,
    "groups_duplicate": 1,
    "groups_dropped": {"stale": 1},
    "weights_bytes_full": 4000000,
    "weights_bytes_sent": 1000000,
    "delta_ratio_median": 3.5,
    "learner_idle_share": 0.2,
    "final_version": 3,
    "final_root": "ab" * 32,
    "samplers": [
        {"id": "<eu>", "version": 3, "root": "ab" * 32, "groups": 15, "tokens": 900, "restarts": 1, "bytes_received": 9}
    ],
}
RECORDS = [
    {"step": 0, "wall_s": 1.0, "accuracy": 0.3},
    *({"step": n, "wall_s": n + 1.0, "loss": 0.1, "reward_mean": 0.2 * n, "grad_norm": 1.0} for n in (1, 2, 3)),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


class Page(HTMLParser):
    """Collects what a page would load from elsewhere, and its tables' cells."""

    def __init__(self) -> None:
        super().__init__()
        self.external: list[str] = []
        self.svgs = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.external.append(value)


def test_the_report_is_one_page_with_plots_that_loads_nothing(run: Path):
    page = Page()
    text = write_report(run).read_text()
    page.feed(text)
    assert page.external == []
    assert page.svgs >= 4
    assert "30.0% → 70.0%" in text
    assert "<eu>" not in text, "names are escaped"
    assert "&lt;eu&gt;" in text


def test_the_groups_table_adds_up_to_what_was_acknowledged(run: Path):
    text = write_report(run).read_text()
    cells = dict(re.findall(r"<tr><td>([^<]+)</td><td>([\d,]+)</td></tr>", text))
    assert int(cells["acknowledged"]) == (
        int(cells["trained"]) + int(cells["dropped: stale"]) + int(cells["left in the buffer"])
    )


def test_rewards_above_one_and_bars_far_below_the_bound_are_in_the_picture():
    tall = learning_curve([{"step": step, "reward_mean": 1.5 + step} for step in range(3)])
    assert ">3.5<" in tall
    assert ">1.0<" in learning_curve([{"step": step, "reward_mean": 0.1 * step} for step in range(3)])
    assert "> bound<" in staleness({"0": 4, "2": 1}, 8)
    far = staleness({"0": 40, "2": 10}, 1_000_000)
    assert "the bound is 1000000" in far
    assert ">1<" in far, "the axis ends near the bars"


def test_a_report_does_not_take_the_place_of_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run)
    for folder in (Path("."), run):
        with pytest.raises(UsageError, match="is a folder: name the file to write"):
            write_report(run, folder)


def test_equal_runs_make_equal_reports(run: Path, tmp_path: Path):
    assert write_report(run, tmp_path / "a.html").read_bytes() == write_report(run, tmp_path / "b.html").read_bytes()


def test_a_folder_without_a_summary_is_named(tmp_path: Path):
    with pytest.raises(InputMissingError, match=r"summary\.json is not there"):
        read_run(tmp_path)


@pytest.mark.parametrize("damage", [b"{oops\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_metrics_line_that_is_no_json_object_is_named_by_number(run: Path, damage: bytes):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(BadInputError, match="line 5 is not a JSON object"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").write_bytes(damage)
    with pytest.raises(BadInputError, match=r"summary\.json is not a JSON object"):
        read_run(run)

"""docs/gepo.md says what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli import main
from services.learner.losses.metrics import finish_metrics
from services.learner.losses.prepared import Exclusion
from services.learner.losses.settings import LossName, LossSettings
from services.learner.losses.table import dials_of
from tests.unit.learner.losses.building import evaluate, random_case

PAGE = Path(__file__).parents[4] / "docs" / "gepo.md"


def section(title: str) -> str:
    return PAGE.read_text().split(f"# {title}\n", 1)[1].split("\n#", 1)[0]


def table(title: str) -> list[dict[str, str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.mark.parametrize("name", list(LossName))
def test_the_table_of_defaults_is_that_of_the_code(name: LossName) -> None:
    (row,) = [row for row in table("Defaults") if row["name"] == name]
    dials = dials_of(LossSettings(name=name))
    for key, shown in row.items():
        if key != "name" and shown != "-":
            assert shown == str(getattr(dials, key))


def test_the_family_lists_every_loss() -> None:
    assert {row["name"].strip("`") for row in table("The family")} == {name.value for name in LossName}


def test_every_key_of_the_section_is_documented_with_its_default() -> None:
    rows = {key: row["default"] for row in table("The `[loss]` keys") for key in re.findall(r"`(\w+)`", row["key"])}
    assert set(rows) == set(LossSettings.model_fields)
    for key, field in LossSettings.model_fields.items():
        if field.default is not None:
            shown = str(field.default).lower()
            assert rows[key] == shown or float(rows[key]) == field.default


def test_every_reason_to_leave_a_row_out_is_documented() -> None:
    shown = {row["reason (metric `excluded_…`)"].split("`")[1] for row in table("Who takes part")}
    assert shown == {reason.name.lower() for reason in Exclusion if reason} | {"learner_nonfinite"}


def test_every_metric_is_documented() -> None:
    text = section("Metrics of a step")
    output, _ = evaluate(random_case("gepo", 51))
    names = {name for name in finish_metrics([output.metrics]) if not name.startswith("excluded_")} - {"loss"}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cases.json"
    path.write_text(section("Try a loss").split("```json\n")[1].split("```")[0])
    assert main(["loss", "--cases", str(path)]) == 0
    assert "on policy: gepo" in capsys.readouterr().out


def test_the_settings_load_without_torch() -> None:
    code = "import sys, services.learner.loss_cases; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PAGE.parents[1], check=False).returncode == 0

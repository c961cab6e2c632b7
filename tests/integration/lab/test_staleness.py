"""The grid: names, resuming, tables, plots. Cells run in this process; worker processes are tested end to end."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from services.cli import main
from services.lab.arena import Arena, Cell
from services.lab.plots import draw_staleness
from services.lab.staleness import Grid, make_cell, parse_contender, run_grid, work
from services.lab.stats import Estimate, paired
from services.lab.tables import as_table, compared, leading, lines_of
from services.learner.losses.settings import LossName
from services.runtime.errors import BadInputError, UsageError
from services.sampler.delays import DelayKind

TINY = Arena(columns=1, prompts_per_step=2, group_size=2, steps=4, eval_every=2, eval_problems=8, warm_up=0.05)


def quiet() -> Console:
    return Console(quiet=True)


def test_gspo_takes_the_clip_of_the_published_comparison_unless_told_otherwise() -> None:
    assert parse_contender("gspo").settings.clip_high == 0.2
    assert parse_contender("gspo", published_gspo_clip=False).settings.clip_high is None
    assert parse_contender("gspo:clip_high=0.5").settings.clip_high == 0.5
    assert parse_contender("gepo").settings.clip_high is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gepo:name=gspo", "is not one of"),
        ("gepoo", "nearest are gepo"),
        ("gepo:clip=1", "nearest are clip_low"),
        ("gepo:clip_low=x", "clip_low"),
    ],
)
def test_an_unknown_loss_or_key_is_a_usage_error(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_contender(text)


def test_a_delay_is_a_number_of_versions_or_a_kind() -> None:
    loss = parse_contender("gepo")
    lag = make_cell(TINY, loss, rate=1e-3, delay="64", seed=0, links="weights")
    assert (lag.lag_versions, lag.max_staleness) == (64, 64)
    late = make_cell(TINY, loss, rate=1e-3, delay="lognormal", seed=0, links="rollouts")
    assert (late.lag_versions, late.max_staleness) == (None, TINY.max_staleness)
    assert (late.delay.weights.kind, late.delay.rollouts.kind) == (DelayKind.NONE, DelayKind.LOGNORMAL)
    with pytest.raises(UsageError, match="neither a number"):
        make_cell(TINY, loss, rate=1e-3, delay="soon", seed=0, links="both")


def test_a_cell_passes_to_its_worker_unchanged() -> None:
    """As JSON, which has no infinity: `clip_high=inf` would arrive as unset, and be the loss's own."""
    with pytest.raises(UsageError, match=r"clip_high: Input should be a finite number"):
        parse_contender("gepo:clip_high=inf")
    arena = Arena.model_validate({"speeds": "1,0.5"})
    assert arena.speeds == (1.0, 0.5)
    cell = make_cell(arena, parse_contender("gepo:clip_high=3"), rate=1e-3, delay="weibull", seed=1, links="both")
    assert Cell.model_validate_json(cell.model_dump_json()) == cell


def test_cells_of_other_settings_have_other_names_and_equal_ones_the_same() -> None:
    grid = Grid(
        contenders=(parse_contender("gepo"), parse_contender("gspo"), parse_contender("gspo:clip_high=0.3")),
        rates=(1e-3, 1e-2),
        delays=("0", "8", "weibull"),
        seeds=2,
    )
    keys = [cell.key for _, cell in grid.cells(TINY, "weights")]
    assert len(set(keys)) == len(keys) == 3 * 2 * 3 * 2
    assert keys == [cell.key for _, cell in grid.cells(TINY, "weights")]
    assert keys[0] != next(iter(grid.cells(TINY.model_copy(update={"steps": 5}), "weights")))[1].key


def run_here(cells: list[Cell], out: Path) -> None:
    (out / "cells").mkdir(parents=True, exist_ok=True)
    for cell in cells:
        work(cell.model_dump_json(), str(out))


def test_finished_cells_are_read_and_not_run_again(tmp_path: Path) -> None:
    cell = make_cell(TINY, parse_contender("gepo"), rate=1e-3, delay="1", seed=0, links="weights")
    run_here([cell], tmp_path)
    file = tmp_path / "cells" / f"{cell.key}.json"
    before = file.stat().st_mtime_ns
    (result,) = run_grid([cell], tmp_path, 1, quiet())
    assert result.cell == cell
    assert file.stat().st_mtime_ns == before
    file.write_text('{"cell": {}}')
    with pytest.raises(BadInputError, match="delete it"):
        run_grid([cell], tmp_path, 1, quiet())


def test_the_table_the_comparison_and_the_plots_come_from_the_same_lines(tmp_path: Path) -> None:
    grid = Grid(
        contenders=(parse_contender("gepo"), parse_contender("grpo")), rates=(1e-3,), delays=("0", "1"), seeds=2
    )
    pairs = list(grid.cells(TINY, "weights"))
    run_here([cell for _, cell in pairs], tmp_path)
    results = run_grid([cell for _, cell in pairs], tmp_path, 1, quiet())
    lines = lines_of([contender.label for contender, _ in pairs], results)
    assert [(line.delay, line.label, len(line.results)) for line in lines] == [
        ("0", "gepo", 2),
        ("0", "grpo", 2),
        ("1", "gepo", 2),
        ("1", "grpo", 2),
    ]
    last = [result.last for result in lines[0].results]
    assert lines[0].as_json()["last"] == Estimate.of(last).as_json()
    assert lines[0].results[0].cell.loss.name is LossName.GEPO
    assert len(leading(lines)) == 2
    assert [row["rival"] for row in compared(lines, "gepo")] == ["grpo", "grpo"]
    console = Console(record=True, width=160, quiet=False, file=(tmp_path / "table.txt").open("w"))
    console.print(as_table(lines, "title"))
    assert "grpo" in console.export_text()
    console.file.close()
    for path in draw_staleness(lines, tmp_path):
        assert path.read_text().lstrip().startswith("<?xml")


def test_an_estimate_is_students_interval() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert estimate.mean == pytest.approx(2.0)
    assert estimate.half == pytest.approx(4.303 / 3**0.5)
    assert Estimate.of([5.0]).half is None
    assert paired([1.0, 2.0], [0.5, 1.5]).half == pytest.approx(0.0)


@pytest.mark.parametrize(
    "words",
    [
        ["--losses", "nothing"],
        ["--delays", "now"],
        ["--lrs", "fast"],
        ["--lrs", "0"],
        ["--lrs", "nan"],
        ["--seeds", "0"],
        ["--losses", ","],
        ["--set", "columns"],
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "staleness", "--out", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err.startswith("heterorl lab: ")


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("colour=red", "colour"),
        ("speeds=1,0", "speeds"),
        ("speeds=", "speeds"),
        ("step_s=inf", "step_s"),
        ("device=meta", "device"),
        ("device=cuda:99", "torch sees"),
    ],
)
def test_a_key_that_the_arena_cannot_take_is_a_configuration_error(
    pair: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "staleness", "--out", str(tmp_path), "--set", pair]) == 78
    assert words in capsys.readouterr().err


def test_the_command_prints_json_from_finished_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [f"{key}={value}" for key, value in TINY.model_dump(exclude_unset=True).items() if key != "steps"]
    words = [
        "--losses",
        "gepo,gepo",  # what is named twice is one cell, not two seeds
        "--delays",
        "0",
        "--lrs",
        "1e-3,0.001",
        "--seeds",
        "1",
        "--steps",
        "4",
        "--out",
        str(tmp_path),
    ]
    cell = make_cell(TINY, parse_contender("gepo"), rate=1e-3, delay="0", seed=0, links="weights")
    run_here([cell], tmp_path)
    options = [word for pair in sets for word in ("--set", pair)]
    assert main(["lab", "staleness", *words, *options, "--json", "--no-plots"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lines"][0]["loss"] == "gepo"
    assert found["lines"][0]["seeds"] == [0]
    more = [*words, *options, "--seeds", "3", "--no-plots", "--finished"]  # two of the three are missing
    assert main(["lab", "staleness", *more]) == 0
    assert "1" in capsys.readouterr().out
    assert main(["lab", "staleness", *more, "--losses", "grpo"]) == 2
    assert "no cell of this grid is finished" in capsys.readouterr().err

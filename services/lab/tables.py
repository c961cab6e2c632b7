"""What a grid of cells shows: one line per loss, learning rate and delay, with intervals over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from services.lab.experiment import CellResult
from services.lab.stats import Estimate, paired

FIGURES: dict[str, Callable[[CellResult], float]] = {
    "best": lambda result: result.best,
    "last": lambda result: result.last,
    "gap": lambda result: result.gap,
    "late": lambda result: result.late,
    "grad_norm": lambda result: result.grad_norm_mean,
    "grad_norm_max": lambda result: result.grad_norm_max,
    "weight_var": lambda result: result.weight_var_mean,
    "kl": lambda result: result.kl_mean,
    "clip_share": lambda result: result.clip_share_mean,
}
"""Columns of the table, and keys of the JSON."""
_SHOWN = ("best", "last", "gap", "late", "grad_norm", "weight_var", "kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """All seeds of one loss, learning rate and delay; `results` in the order of seeds."""

    task: str
    label: str
    rate: float
    delay: str
    results: tuple[CellResult, ...]

    def estimate(self, figure: str) -> Estimate:
        return Estimate.of([FIGURES[figure](result) for result in self.results])

    def as_json(self) -> dict[str, object]:
        """Estimates of every figure, the values of each seed, and the course averaged over seeds."""
        return {
            "task": self.task,
            "loss": self.label,
            "lr": self.rate,
            "delay": self.delay,
            "seeds": [result.cell.seed for result in self.results],
            **{figure: self.estimate(figure).as_json() for figure in FIGURES},
            "best_by_seed": [result.best for result in self.results],
            "last_by_seed": [result.last for result in self.results],
            "late_by_seed": [round(result.late, 6) for result in self.results],
            "skipped_steps": sum(result.skipped_steps for result in self.results),
            "dropped": _summed([result.dropped for result in self.results]),
            "staleness": _summed([result.staleness for result in self.results]),
            "course": course(self.results),
        }


def lines_of(labels: Sequence[str], results: Sequence[CellResult]) -> list[Line]:
    """Groups the results over seeds; `labels` names the loss of each result. Order of first appearance."""
    grouped: dict[tuple[str, float, str, str], list[CellResult]] = {}
    for label, result in zip(labels, results, strict=True):
        cell = result.cell
        grouped.setdefault((cell.arena.task, cell.optimizer.lr, cell.delay_name, label), []).append(result)
    return [
        Line(task=task, rate=rate, delay=delay, label=label, results=tuple(found))
        for (task, rate, delay, label), found in grouped.items()
    ]


def course(results: Sequence[CellResult]) -> dict[str, list[float]]:
    """Accuracy and followed metrics at each measurement, mean over the results; `step` beside them."""
    count = min(len(result.course) for result in results)
    points = [[result.course[place] for result in results] for place in range(count)]
    columns: dict[str, list[float]] = {"step": [float(at[0].step) for at in points]}
    columns["accuracy"] = [_mean([one.accuracy for one in at]) for at in points]
    for name in points[-1][0].means:
        columns[name] = [_mean([one.means[name] for one in at if name in one.means]) for at in points[1:]]
    return columns


def as_table(lines: Sequence[Line], title: str) -> Table:
    """For the terminal. The best last accuracy of each learning rate and delay is bold."""
    table = Table(title=title, title_justify="left")
    for heading in ("lr", "delay", "loss", "seeds"):
        table.add_column(heading)
    for figure in _SHOWN:
        table.add_column(figure, justify="right")
    leaders = leading(lines)
    for line in lines:
        style = "bold" if leaders[line.task, line.rate, line.delay] is line else None
        table.add_row(
            f"{line.rate:g}",
            line.delay,
            line.label,
            str(len(line.results)),
            *(line.estimate(figure).text() for figure in _SHOWN),
            style=style,
        )
    return table


def leading(lines: Sequence[Line]) -> dict[tuple[str, float, str], Line]:
    """The line with the highest mean last accuracy of each task, learning rate and delay."""
    best: dict[tuple[str, float, str], Line] = {}
    for line in lines:
        place = (line.task, line.rate, line.delay)
        if place not in best or line.estimate("last").mean > best[place].estimate("last").mean:
            best[place] = line
    return best


def compared(lines: Sequence[Line], label: str) -> list[dict[str, object]]:
    """`label` against the loss with the best last accuracy among the others, for each task, learning rate and delay:
    paired differences over the seeds that both have."""
    rows: list[dict[str, object]] = []
    others = [line for line in lines if line.label != label]
    best = leading(others)
    for line in lines:
        rival = best.get((line.task, line.rate, line.delay))
        if line.label != label or rival is None:
            continue
        theirs = {result.cell.seed: result for result in rival.results}
        ours = [result for result in line.results if result.cell.seed in theirs]
        if ours:
            row: dict[str, object] = {"task": line.task, "lr": line.rate, "delay": line.delay, "rival": rival.label}
            for figure in ("last", "late"):
                of = FIGURES[figure]
                difference = paired([of(one) for one in ours], [of(theirs[one.cell.seed]) for one in ours])
                row[f"{figure}_difference"] = difference.as_json()
            rows.append(row)
    return rows


def _summed(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, count in one.items():
            total[key] = total.get(key, 0) + count
    return total


def _mean(values: Sequence[float]) -> float:
    return float(f"{sum(values) / len(values):.5g}")

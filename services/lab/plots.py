"""The laboratory's figures, as PNG and SVG. matplotlib is imported here only."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from services.lab.tables import Line, course
from services.lab.theory import BernoulliGrid, GaussianLine

_COLOURS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#c2255c", "#868e96")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "svg.hashsalt": "heterorl",  # equal data makes equal files
}
_ROWS = (("accuracy", "accuracy", False), ("weight_var", "variance of the weight", True), ("kl_k2", "KL (k2)", True))
_ROUNDING = 1e-6
_NAMES = {"own": "p/q", "group": "p/E", "bound": "p/max(q, E)", "max": "p/max q"}


def draw_staleness(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Accuracy, weight variance and KL over steps, a column for each delay, a picture for each task and learning rate
    (the paper's figures 4, 5 and 7, from our data); and last accuracy over delays. Returns the files."""
    paths: list[Path] = []
    for task, rate in dict.fromkeys((line.task, line.rate) for line in lines):
        chosen = [line for line in lines if (line.task, line.rate) == (task, rate)]
        paths.append(_courses(chosen, folder / f"course-{task}-lr{rate:g}.svg"))
        paths.append(_by_delay(chosen, folder / f"delays-{task}-lr{rate:g}.svg"))
    return paths


def _courses(lines: Sequence[Line], path: Path) -> Path:
    delays = list(dict.fromkeys(line.delay for line in lines))
    colours = _colours(lines)
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType] - the keys are matplotlib's own
        figure = Figure(figsize=(max(6.4, 2.6 * len(delays) + 0.8), 6.2), layout="constrained")
        grid = figure.subplots(len(_ROWS), len(delays), squeeze=False, sharex=True, sharey="row")
        for column, delay in enumerate(delays):
            for row, (key, label, log) in enumerate(_ROWS):
                axes: Axes = grid[row][column]
                for line in (one for one in lines if one.delay == delay):
                    _draw_course(axes, line, key, colours[line.label], log)
                if row == 0:
                    title = f"staleness {delay}" if delay.isdigit() else delay
                    axes.set_title(f"{title}, {_seeds(lines, delay)}", loc="left", fontweight="bold")
                if column == 0:
                    axes.set_ylabel(label)
                if row == len(_ROWS) - 1:
                    axes.set_xlabel("optimizer step")
        # By colour and not from one column's curves: a loss may be missing at some delay.
        strokes = [Line2D([], [], color=colour, linewidth=1.6) for colour in colours.values()]
        figure.legend(strokes, list(colours), loc="outside lower center", ncols=len(colours), frameon=False)
        figure.savefig(path, metadata={"Date": None})
    return path


def _draw_course(axes: Axes, line: Line, key: str, colour: str, log: bool) -> None:
    """Each seed faint, their mean strong; a logarithmic axis leaves out what is 0 but for rounding."""
    for results, alpha, width in [([one], 0.25, 0.7) for one in line.results] + [(list(line.results), 1.0, 1.6)]:
        points = course(results)
        steps = points["step"] if key == "accuracy" else points["step"][1:]
        pairs = [(x, y) for x, y in zip(steps, points.get(key, []), strict=False) if y > _ROUNDING or not log]
        label = line.label if len(results) == len(line.results) and alpha == 1.0 else None
        axes.plot([x for x, _ in pairs], [y for _, y in pairs], color=colour, alpha=alpha, linewidth=width, label=label)
    if log:
        axes.set_yscale("log")


def _by_delay(lines: Sequence[Line], path: Path) -> Path:
    delays = sorted(dict.fromkeys(line.delay for line in lines), key=lambda text: (not text.isdigit(), text.zfill(9)))
    colours, labels = _colours(lines), list(dict.fromkeys(line.label for line in lines))
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for place, label in enumerate(labels):
            shown = [line for line in lines if line.label == label]
            x = [delays.index(line.delay) + (place - (len(labels) - 1) / 2) * 0.12 for line in shown]
            estimates = [line.estimate("last") for line in shown]
            axes.errorbar(
                x,
                [one.mean for one in estimates],
                yerr=[one.half or 0.0 for one in estimates],
                fmt="o",
                color=colours[label],
                label=label,
                capsize=2,
                markersize=4,
            )
        axes.set_xticks(range(len(delays)), [f"{delay}\n{_seeds(lines, delay)}" for delay in delays])
        axes.set_xlabel("staleness (versions) or delay model")
        axes.set_ylabel("last accuracy, 95 % interval")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})
    return path


def draw_theory(grid: BernoulliGrid, line: GaussianLine, path: Path) -> Path:
    """Where which weight has the smaller variance: Bernoulli policies exactly, with groups of draws, Gaussians."""
    with mpl.rc_context(_STYLE | {"axes.grid": False}):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(11.5, 3.6), layout="constrained")
        first, second, third = figure.subplots(1, 3)
        _variance_map(first, grid, "exact", "group", "p/E_q[q] against p/q")
        _variance_map(second, grid, "drawn", "max", f"p/max_j q_j against p/q, G = {grid.group_size}")
        for name, colour in zip(line.moments, _COLOURS, strict=False):
            third.plot(line.gaps, line.moments[name].variance, color=colour, label=_NAMES[name])
        third.axvline(line.crossing, color="#868e96", linestyle="--", linewidth=1)
        third.annotate(f" {line.crossing:.3f}", (line.crossing, 0.02), color="#868e96")
        third.set_ylim(0, 1)
        third.set_xlabel("gap of the means")
        third.set_title("unit Gaussians: variance", loc="left", fontweight="bold")
        third.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    return path


def _variance_map(axes: Axes, grid: BernoulliGrid, kind: str, name: str, title: str) -> None:
    moments = grid.exact if kind == "exact" else grid.drawn
    # The variance of p/q is 0 on the diagonal, where any other is larger.
    ratio = np.log10((moments[name].variance + 1e-6) / (moments["own"].variance + 1e-6))
    mesh = axes.pcolormesh(
        grid.chances,
        grid.chances,
        np.clip(ratio, -3, 3),
        cmap="PuOr_r",
        norm=TwoSlopeNorm(0.0, -3.0, 3.0),
        rasterized=True,
    )
    axes.contour(grid.chances, grid.chances, ratio, levels=[0.0], colors="black", linewidths=0.8)
    axes.set_xlabel("q, the sampler's chance")
    axes.set_ylabel("p, the learner's chance")
    axes.set_title(title, loc="left", fontweight="bold")
    figure = axes.get_figure()
    assert figure is not None, "axes of a figure"
    figure.colorbar(mesh, ax=axes, label="log10 of the ratio of variances")


def _seeds(lines: Sequence[Line], delay: str) -> str:
    """How many seeds the lines of this delay have."""
    counts = {len(line.results) for line in lines if line.delay == delay}
    most = max(counts)
    return f"{most} seed{'s' if most > 1 else ''}" if len(counts) == 1 else f"{min(counts)}-{most} seeds"


def _colours(lines: Sequence[Line]) -> dict[str, str]:
    labels = dict.fromkeys(line.label for line in lines)
    return {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(labels)}

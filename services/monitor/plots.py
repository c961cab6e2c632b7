"""The report's plots, as SVG text. matplotlib is imported here only."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

_INK, _ACCENT, _SECOND, _THIRD = "#1f2933", "#0b7285", "#d9480f", "#5f3dc4"
_STYLE: "dict[RcKeyType, object]" = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": _INK,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "svg.fonttype": "none",
    "svg.hashsalt": "heterorl",  # equal data makes equal files
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric over steps: a value for each step at which it was recorded."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


def series(records: Sequence[Mapping[str, float]], key: str) -> Series:
    """The records that carry `key`, in order."""
    pairs = [(record["step"], record[key]) for record in records if key in record and "step" in record]
    return Series(steps=tuple(step for step, _ in pairs), values=tuple(value for _, value in pairs))


def smoothed(values: Sequence[float], span: int = 9) -> list[float]:
    """Centred moving average that shrinks at the ends."""
    half = span // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _svg(draw: Callable[[Axes], None], title: str, size: tuple[float, float] = (5.6, 3.0)) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left", fontweight="bold", color=_INK)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]  # without the XML prologue, to stand inside HTML


def learning_curve(records: Sequence[Mapping[str, float]]) -> str:
    """Held-out accuracy as points, mean training reward as a line."""

    def draw(axes: Axes) -> None:
        reward, accuracy = series(records, "reward_mean"), series(records, "accuracy")
        axes.plot(reward.steps, reward.values, color=_ACCENT, alpha=0.25, linewidth=1)
        axes.plot(reward.steps, smoothed(reward.values), color=_ACCENT, label="mean training reward")
        axes.plot(accuracy.steps, accuracy.values, "o-", color=_SECOND, label="held-out accuracy")
        axes.set_xlabel("optimizer step")
        if all(0.0 <= value <= 1.0 for value in (*reward.values, *accuracy.values)):  # rewards need not be shares
            axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, loc="lower right")

    return _svg(draw, "Learning")


def staleness(histogram: Mapping[str, int], bound: int) -> str:
    """Trained groups by staleness; the bound is drawn, unless it is so far off that the bars would vanish."""

    def draw(axes: Axes) -> None:
        keys = sorted(int(key) for key in histogram)
        largest = max(keys, default=0)
        near = bound <= 8 * (largest + 4)
        axes.bar(keys, [histogram[str(key)] for key in keys], color=_THIRD, width=0.8)
        if near:
            axes.axvline(bound + 0.5, color=_SECOND, linestyle="--", linewidth=1)
            axes.annotate(
                " bound", (bound + 0.5, 1), xycoords=("data", "axes fraction"), ha="left", va="top", color=_SECOND
            )
        axes.set_xlim(-0.7, (bound if near else largest) + 2.2)
        axes.set_xlabel("staleness (versions)" if near else f"staleness (versions); the bound is {bound}")
        axes.set_ylabel("groups trained")

    return _svg(draw, "Staleness at consumption")


def lines(records: Sequence[Mapping[str, float]], title: str, keys: Mapping[str, str], log: bool = False) -> str:
    """Several metrics over steps. keys: metric name → label."""

    def draw(axes: Axes) -> None:
        for (key, label), colour in zip(keys.items(), (_ACCENT, _SECOND, _THIRD), strict=False):
            one = series(records, key)
            axes.plot(one.steps, one.values, color=colour, alpha=0.25, linewidth=1)
            axes.plot(one.steps, smoothed(one.values), color=colour, label=label)
        axes.set_xlabel("optimizer step")
        if log:
            axes.set_yscale("log")
        if len(keys) > 1:
            axes.legend(frameon=False)

    return _svg(draw, title)


def weights(full_bytes: float, sent_bytes: float) -> str:
    """What full weights would have cost against what was sent."""

    def draw(axes: Axes) -> None:
        axes.barh(["sent", "full"], [sent_bytes / 1e6, full_bytes / 1e6], color=[_ACCENT, "#cbd2d9"])
        axes.set_xlabel("MB of weights over the wide-area links")
        axes.grid(visible=False, axis="y")

    return _svg(draw, "Weight traffic", (5.6, 1.8))

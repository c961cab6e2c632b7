"""One self-contained HTML page from a run's folder: summary.json and metrics.jsonl, nothing fetched, nothing hidden."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from services.monitor import plots
from services.monitor.views import human_bytes
from services.runtime.errors import BadInputError, InputMissingError, UsageError
from services.runtime.files import atomic_write

Summary = Mapping[str, object]
Records = Sequence[Mapping[str, float]]

_CSS = """
:root { color-scheme: light; --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --accent: #0b7285; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #f8fafb; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 10px; }
p { color: var(--soft); margin: 4px 0 0; max-width: 78ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 12px; margin-top: 22px; }
.card, figure { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; margin: 0; }
.card b { display: block; font-size: 20px; white-space: nowrap; } .card span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 12px; }
figure svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; background: #fff; border: 1px solid var(--line); }
th, td { text-align: right; padding: 7px 12px; border-top: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
code { font-size: 13px; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run's folder says. `summary` follows docs/summary.md, `records` are the lines of metrics.jsonl."""

    summary: Summary
    records: Records
    events: tuple[str, ...] = ()


def read_run(folder: Path) -> Run:
    """Raises InputMissingError when the folder holds no summary, BadInputError naming the line that does not parse."""
    summary_file, metrics_file = folder / "summary.json", folder / "metrics.jsonl"
    if not summary_file.is_file():
        raise InputMissingError(f"{summary_file} is not there: the run has not ended, or this is not a run's folder")
    records: list[Mapping[str, float]] = []
    lines = metrics_file.read_bytes().splitlines() if metrics_file.is_file() else []
    for number, line in enumerate(lines, 1):
        if (record := _object(line)) is None:
            raise BadInputError(f"{metrics_file} line {number} is not a JSON object: remove it and try again")
        records.append(cast("Mapping[str, float]", record))
    if (summary := _object(summary_file.read_bytes())) is None:
        raise BadInputError(f"{summary_file} is not a JSON object: was it edited?")
    events_file = folder / "events.log"
    events = tuple(events_file.read_text(encoding="utf-8").splitlines()) if events_file.is_file() else ()
    return Run(summary=summary, records=records, events=events)


def _object(text: bytes) -> Mapping[str, object] | None:
    try:
        value: object = json.loads(text)
    except ValueError:  # not JSON, or not text
        return None
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else None


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes `report.html` into the folder (or to `out`) and returns its path. Raises UsageError where `out` is a
    folder."""
    path = out or folder / "report.html"
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name the file to write")
    atomic_write(path, render(read_run(folder), folder.name).encode())
    return path


def _percent(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "–"


def _number(summary: Summary, key: str) -> float:
    value = summary.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def _cards(summary: Summary) -> str:
    full, sent = _number(summary, "weights_bytes_full"), _number(summary, "weights_bytes_sent")
    cards = {
        "held-out accuracy": f"{_percent(summary.get('accuracy_start'))} → {_percent(summary.get('accuracy_end'))}",
        "optimizer steps": f"{_number(summary, 'steps'):,.0f}",
        "wall time": f"{_number(summary, 'wall_s'):,.0f} s",
        "loss": html.escape(str(summary.get("loss", "–"))),
        "greatest staleness (bound)": f"{summary.get('staleness_max')} ({summary.get('max_staleness')})",
        "groups trained": f"{_number(summary, 'groups_trained'):,.0f}",
        "weights sent": f"{human_bytes(sent)} of {human_bytes(full)}",
        "median delta ratio": f"{_number(summary, 'delta_ratio_median'):.2f} ×",
        "learner idle": _percent(summary.get("learner_idle_share")),
    }
    return "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in cards.items())


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _samplers(summary: Summary) -> str:
    samplers = cast("Sequence[Mapping[str, object]]", summary.get("samplers") or [])
    rows = [
        (
            row.get("id", ""),
            row.get("version", ""),
            str(row.get("root", ""))[:16],
            f"{_number(row, 'groups'):,.0f}",
            f"{_number(row, 'tokens'):,.0f}",
            row.get("restarts", ""),
            human_bytes(_number(row, "bytes_received")),
        )
        for row in samplers
    ]
    return _table(("sampler", "version", "root", "groups", "tokens", "restarts", "weights received"), rows)


def _groups(summary: Summary) -> str:
    dropped = cast("Mapping[str, int]", summary.get("groups_dropped") or {})
    acknowledged, trained = _number(summary, "groups_acknowledged"), _number(summary, "groups_trained")
    left = acknowledged - trained - sum(dropped.values())
    rows: list[tuple[object, object]] = [("acknowledged", f"{acknowledged:,.0f}"), ("trained", f"{trained:,.0f}")]
    rows += [(f"dropped: {reason}", f"{count:,}") for reason, count in sorted(dropped.items())]
    rows += [("left in the buffer", f"{left:,.0f}"), ("came again (duplicates)", f"{summary.get('groups_duplicate')}")]
    return _table(("groups", "count"), rows)


def _figures(run: Run) -> list[str]:
    summary = run.summary
    histogram = cast("Mapping[str, int]", summary.get("staleness_histogram") or {})
    figures = [
        plots.learning_curve(run.records),
        plots.staleness(histogram, int(_number(summary, "max_staleness"))),
        plots.weights(_number(summary, "weights_bytes_full"), _number(summary, "weights_bytes_sent")),
    ]
    wanted: list[tuple[str, dict[str, str], bool]] = [
        ("Importance weight: variance", {"weight_var": "variance"}, False),
        ("Clipped share", {"clip_share": "clip share"}, False),
        ("KL between learner and samplers (nats per token)", {"kl_k2": "k2", "kl_k3": "k3"}, True),
        ("Gradient norm", {"grad_norm": "gradient norm"}, False),
        ("Entropy", {"entropy": "entropy (nats per token)"}, False),
        ("Staleness of each step's batch", {"staleness_mean": "mean", "staleness_max": "largest"}, False),
        ("Full size / update size of each version", {"delta_ratio": "ratio"}, False),
    ]
    for title, keys, log in wanted:
        present = {key: label for key, label in keys.items() if any(key in record for record in run.records)}
        if present:
            figures.append(plots.lines(run.records, title, present, log))
    return figures


def render(run: Run, name: str) -> str:
    """The page's text."""
    figures = "".join(f"<figure>{figure}</figure>" for figure in _figures(run))
    events = f"<h2>Events</h2>{_table(('what happened',), [(line,) for line in run.events])}" if run.events else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>HeteroRL: {html.escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body><main>'
        f"<h1>HeteroRL run: {html.escape(name)}</h1>"
        f"<p>Final version {run.summary.get('final_version')}, root <code>{run.summary.get('final_root')}</code>. "
        "Every number below is from summary.json and metrics.jsonl beside this page.</p>"
        f'<div class="cards">{_cards(run.summary)}</div>'
        f'<h2>How it went</h2><div class="plots">{figures}</div>'
        f"<h2>Samplers</h2>{_samplers(run.summary)}<h2>Where every group went</h2>{_groups(run.summary)}{events}"
        "</main></body></html>"
    )

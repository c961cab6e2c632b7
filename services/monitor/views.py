"""Terminal views of a run's status, drawn with rich: one renderer for `heterorl top`, `status` and the demo."""

import sys
from collections.abc import Mapping, Sequence

from google.protobuf.json_format import MessageToJson
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from heterorl.v1 import monitor_pb2, types_pb2

_COLUMNS = 140
"""Width where no terminal shows it."""
_SPARKS = "▁▂▃▄▅▆▇█"
_STATE_STYLE = {
    "GENERATING": "green",
    "SWAPPING": "cyan",
    "LOST": "bold red",
    "SPOOL_FULL": "red",
    "QUARANTINED": "red",
    "STARTING": "yellow",
}


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """The last `width` values as block characters, scaled from their smallest to their largest."""
    tail = values[-width:]
    if not tail:
        return ""
    low, high = min(tail), max(tail)
    span = (high - low) or 1.0
    return "".join(_SPARKS[min(7, int((value - low) / span * 8))] for value in tail)


def console() -> Console:
    """Standard output. A terminal's width is known; elsewhere nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else _COLUMNS)


def human_bytes(count: float) -> str:
    """1536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def as_json(status: monitor_pb2.RunStatus, *, indent: int | None) -> str:
    """Every field by its name in the contract, zeros too: a script asks for `step` before the first."""
    return MessageToJson(
        status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=indent
    )


def phase_name(status: monitor_pb2.RunStatus) -> str:
    """LEARNER_PHASE_WAITING_FOR_GROUPS → "waiting for groups"."""
    return monitor_pb2.LearnerPhase.Name(status.phase).removeprefix("LEARNER_PHASE_").lower().replace("_", " ")


def state_name(state: types_pb2.SamplerState.ValueType) -> str:
    """SAMPLER_STATE_SPOOL_FULL → "SPOOL_FULL"."""
    return types_pb2.SamplerState.Name(state).removeprefix("SAMPLER_STATE_")


def staleness_bars(histogram: Mapping[int, int], bound: int, width: int = 24) -> Table:
    """One bar for each staleness from 0 to the bound; long histograms are cut to the range in use."""
    table = Table.grid(padding=(0, 1))
    largest = max(histogram.values(), default=0)
    last = min(bound, max(histogram, default=0) + 1)
    for staleness in range(last + 1):
        count = histogram.get(staleness, 0)
        filled = round(width * count / largest) if largest else 0
        table.add_row(f"{staleness:>3}", Text("█" * filled, style="magenta"), f"{count}")
    return table


def samplers_table(status: monitor_pb2.RunStatus) -> Table:
    """A row for each sampler that the learner knows."""
    table = Table(expand=True, box=None, header_style="bold")
    for column in ("sampler", "state", "version", "lag", "tokens/s", "groups", "spool", "received", "restarts", "seen"):
        left = column in ("sampler", "state")
        table.add_column(column, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    for sampler in status.samplers:
        report = sampler.report
        state = "QUARANTINED" if sampler.quarantined_for else state_name(sampler.state)
        doing = state
        if report.HasField("fetch") and report.fetch.bytes_total and state != "LOST":
            share = report.fetch.bytes_done / report.fetch.bytes_total
            left = report.fetch.bytes_total - report.fetch.bytes_done
            eta = f", {left / report.fetch.bytes_per_s:.0f} s left" if report.fetch.bytes_per_s else ""
            doing = f"{state} · fetching v{report.fetch.target_version} {share:.0%}{eta}"
        table.add_row(
            Text(sampler.sampler_id),
            Text(doing, style=_STATE_STYLE.get(state, "")),
            str(report.policy_version),
            str(max(0, status.policy_version - report.policy_version)),
            f"{report.tokens_per_s:,.0f}",
            f"{sampler.groups_accepted:,}",
            str(report.spool_groups),
            human_bytes(report.weights_bytes_received),
            str(sampler.restarts),
            f"{sampler.last_seen_s:.0f} s ago",
        )
    return table


def _progress(status: monitor_pb2.RunStatus, rewards: Sequence[float]) -> Table:
    table = Table.grid(padding=(0, 2))
    metrics = status.metrics
    total = status.steps_total
    table.add_row("step", f"{status.step:,}" + (f" of {total:,}" if total else ""))
    if total:
        table.add_row("", ProgressBar(total=total, completed=status.step, width=40))
    table.add_row("reward", f"{metrics.get('reward_mean', 0.0):.3f}  {sparkline(rewards)}")
    accuracies = [point.accuracy for point in status.evals]
    if accuracies:
        table.add_row(
            "held-out accuracy", f"{accuracies[0]:.1%} → [bold green]{accuracies[-1]:.1%}[/]  {sparkline(accuracies)}"
        )
    table.add_row("loss", f"{metrics.get('loss', 0.0):+.4f}   gradient norm {metrics.get('grad_norm', 0.0):.3f}")
    table.add_row("learner idle", f"{status.idle_share:.0%}")
    sent, full = status.weights_bytes_sent, status.weights_bytes_full
    ratio = f"  ({full / sent:.1f} × smaller)" if sent else ""
    table.add_row("weights", f"{human_bytes(sent)} sent of {human_bytes(full)} full{ratio}")
    table.add_row(
        "groups",
        f"{status.groups_trained:,} trained · {status.groups_buffered:,} waiting · {status.leases_active:,} leased · "
        f"{sum(status.groups_dropped.values()):,} dropped · {status.groups_duplicate:,} duplicate",
    )
    return table


def render(status: monitor_pb2.RunStatus, rewards: Sequence[float] = (), events: Sequence[str] = ()) -> RenderableType:
    """The whole view. rewards: mean reward of each step so far; events: lines to show below, newest last."""
    title = Text.assemble(  # Text: what comes from the network is no markup
        (status.run_id, "bold"),
        f" · {phase_name(status)} · version {status.policy_version} "
        f"({status.policy_root[:12] or '–'}) · {status.loss_name} · {status.uptime_s:.0f} s",
    )
    upper = Table.grid(expand=True, padding=(0, 2))
    upper.add_column(ratio=3)
    upper.add_column(ratio=2)
    upper.add_row(
        _progress(status, rewards),
        Group(
            Text(f"staleness of trained groups (bound {status.max_staleness})", style="bold"),
            staleness_bars(dict(status.staleness_histogram), status.max_staleness),
        ),
    )
    parts: list[RenderableType] = [Panel(upper, title=title, title_align="left"), samplers_table(status)]
    if events:
        parts.append(Panel(Text("\n".join(events)), title="events", title_align="left"))
    return Group(*parts)

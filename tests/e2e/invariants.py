"""What must hold for every run's summary.json, checked against the learner's journal."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEYS = {
    "steps",
    "wall_s",
    "loss",
    "accuracy_start",
    "accuracy_end",
    "max_staleness",
    "staleness_max",
    "staleness_histogram",
    "groups_trained",
    "groups_acknowledged",
    "groups_duplicate",
    "groups_dropped",
    "weights_bytes_full",
    "weights_bytes_sent",
    "delta_ratio_median",
    "learner_idle_share",
    "final_version",
    "final_root",
    "samplers",
}
SAMPLER_KEYS = {"id", "version", "root", "groups", "tokens", "restarts", "bytes_received"}


def check_summary(summary: Mapping[str, Any], journal: Path) -> None:
    """Raises AssertionError with what does not hold."""
    assert set(summary) >= KEYS
    histogram = {int(staleness): count for staleness, count in summary["staleness_histogram"].items()}
    assert summary["staleness_max"] <= summary["max_staleness"]
    assert max(histogram, default=0) == summary["staleness_max"]
    assert sum(histogram.values()) == summary["groups_trained"]
    assert summary["final_version"] == summary["steps"]
    with sqlite3.connect(journal) as database:
        rows = database.execute(
            "SELECT trained_step IS NOT NULL, dropped_reason, verdict, policy_version, trained_step FROM groups"
            " WHERE purpose = 1"
        ).fetchall()
        roots = dict(database.execute("SELECT version, root FROM versions WHERE NOT retired").fetchall())
    trained = [row for row in rows if row[0]]
    left = [row for row in rows if not row[0] and row[1] is None and row[2] == 1]
    assert len(rows) == summary["groups_acknowledged"]
    assert len(trained) == summary["groups_trained"]
    dropped = sum(summary["groups_dropped"].values())
    assert summary["groups_acknowledged"] == summary["groups_trained"] + dropped + len(left)
    # Step s is taken by the learner at version s - 1: the journal itself shows each group's staleness.
    staleness = [step - 1 - version for _, _, _, version, step in trained]
    assert all(0 <= value <= summary["max_staleness"] for value in staleness)
    assert max(staleness, default=0) == summary["staleness_max"]
    assert roots[summary["final_version"]] == summary["final_root"]
    for sampler in summary["samplers"]:
        assert set(sampler) >= SAMPLER_KEYS
        assert sampler["root"] == roots[sampler["version"]], f"{sampler['id']} follows another policy"

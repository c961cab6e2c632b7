"""The demo's last words: a table of its summary, and the exported policy asked for a sum."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from services.monitor.views import human_bytes


class Generates(Protocol):
    """What a causal LM of transformers does; the library's own annotation does not fit its classes."""

    def generate(self, **inputs: object) -> torch.Tensor: ...


def print_summary(out: Path, console: Console) -> None:
    """Reads OUT/summary.json and OUT/policy."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    start, end = summary["accuracy_start"], summary["accuracy_end"]
    full, sent = summary["weights_bytes_full"], summary["weights_bytes_sent"]
    dropped = cast("Mapping[str, int]", summary["groups_dropped"])
    table = Table(title="HeteroRL demo", title_justify="left", show_header=False)
    rows = {
        "held-out accuracy": f"{_percent(start)} → {_percent(end)}",
        "optimizer steps": f"{summary['steps']} in {summary['wall_s']:.0f} s with {summary['loss']}",
        "greatest staleness trained": f"{summary['staleness_max']} (bound {summary['max_staleness']})",
        "groups": f"{summary['groups_acknowledged']} acknowledged, {summary['groups_trained']} trained, "
        f"{sum(dropped.values())} dropped, {summary['groups_duplicate']} duplicate",
        "weights": f"{human_bytes(sent)} sent instead of {human_bytes(full)}"
        + (f" ({full / sent:.2f} × smaller)" if sent else ""),
        "median delta ratio": f"{summary['delta_ratio_median']:.2f} ×",
        "learner idle": f"{summary['learner_idle_share']:.0%}",
        "final version": f"{summary['final_version']}, root {summary['final_root'][:16]}",
    }
    for sampler in summary["samplers"]:
        rows[sampler["id"]] = (
            f"version {sampler['version']}, {sampler['groups']} groups, {sampler['tokens']:,} tokens, "
            f"{sampler['restarts']} restarts, {human_bytes(sampler['bytes_received'])} of weights received"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if (out / "policy").is_dir():
        prompt, answer = ask(out / "policy", "358+467=")
        console.print(f"the exported policy answers: {prompt}[bold]{answer}[/]")
    for name in ("report.html", "summary.json", "metrics.jsonl", "policy"):
        if not (out / name).exists():
            continue  # an interrupted run exports no policy
        console.print(f"{out / name}", highlight=False, soft_wrap=True)


def ask(policy: Path, prompt: str) -> tuple[str, str]:
    """Greedy answer of a Hugging Face directory to one prompt."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = cast("Generates", model).generate(**inputs, max_new_tokens=12, do_sample=False)
    return prompt, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

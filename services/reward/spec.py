"""Grader specifications: data that a learner sends, checked here before a grader sees it."""

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from services.runtime.errors import ScoreError

GRADERS_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GraderSpec:
    """One grader of a reward. `options` are the grader's own (docs/rewards.md), as plain JSON values."""

    name: str
    weight: float = 1.0
    options: Mapping[str, object] = field(default_factory=dict[str, object])


def as_json(specs: Sequence[GraderSpec]) -> list[dict[str, object]]:
    """The form that `parse_graders` reads."""
    return [{"name": spec.name, "weight": spec.weight, "options": dict(spec.options)} for spec in specs]


def parse_graders(value: object) -> tuple[GraderSpec, ...]:
    """Reads a grader's name, one {"name", "weight", "options"} object, or a list of those.

    Checks the shape only; `services.reward.graders.build` checks names and options. Raises ScoreError.
    """
    entries = cast("list[object]", value) if isinstance(value, list) else [value]
    if not entries:
        raise ScoreError("The reward names no grader; name at least one, for example math.")
    if len(entries) > GRADERS_MAX:
        raise ScoreError(f"The reward names {len(entries)} graders; at most {GRADERS_MAX} are allowed.")
    return tuple(_parse_grader(entry) for entry in entries)


def parse_graders_text(text: str) -> tuple[GraderSpec, ...]:
    """Reads a command line's value: a grader's bare name, or JSON. Raises ScoreError."""
    if not text.lstrip().startswith(("{", "[", '"')):
        return parse_graders(text.strip())
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"The grader specification is not JSON: {error}.") from error
    return parse_graders(value)


def _parse_grader(value: object) -> GraderSpec:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise ScoreError(f"A grader must be a name or an object with name, weight and options, not {value!r:.60}.")
    entry = cast("dict[str, object]", value)
    for key in entry:
        if key not in ("name", "weight", "options"):
            raise ScoreError(f"A grader has no key {key!r:.60}; its keys are name, weight and options.")
    name, weight, options = entry.get("name"), entry.get("weight", 1.0), entry.get("options", {})
    if not isinstance(name, str) or not name:
        raise ScoreError("A grader needs a name, for example math.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= sys.float_info.max:
        raise ScoreError(f"The weight of grader {name} must be a finite number, not {weight!r:.60}.")
    if not isinstance(options, dict):
        raise ScoreError(f"The options of grader {name} must be an object, not {options!r:.60}.")
    return GraderSpec(name=name, weight=float(weight), options=cast("dict[str, object]", options))


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint that names the known word nearest to `word`, or all of them if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."

"""`heterorl config`: what a process would run with, and where each value comes from."""

import argparse
import importlib
import json
import os
import tomllib
from pathlib import Path
from typing import cast

from services.runtime.config import Section, add_config_arguments, load
from services.runtime.config_render import render_toml, toml_value

TREES = {
    "learner": ("services.learner.config", "LearnerConfig"),
    "sampler": ("services.sampler.config", "SamplerConfig"),
    "relay": ("services.relay.config", "RelayConfig"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print the resolved values and where each came from")
    show.add_argument("process", choices=TREES, help="whose configuration")
    show.add_argument("--json", action="store_true", help="print one JSON object: key -> value, source")
    add_config_arguments(show)
    default = actions.add_parser("default", help="print a commented file with every key and its default")
    default.add_argument("process", choices=TREES, help="whose configuration")


def run(arguments: argparse.Namespace) -> int:
    tree = tree_of(arguments.process)
    if arguments.action == "default":
        print(render_toml(tree), end="")
        return 0
    resolved = load(tree, cast("Path | None", arguments.config), arguments.overrides, os.environ)
    values = {key: _value_at(resolved.value, key) for key in resolved.sources}
    if arguments.json:
        plain = {key: {"value": _plain(value), "source": resolved.sources[key]} for key, value in values.items()}
        print(json.dumps(plain, indent=2, ensure_ascii=False))
        return 0
    rows = [
        (key, "(unset)" if value is None else toml_value(value), resolved.sources[key]) for key, value in values.items()
    ]
    key_width, value_width = (min(60, max(len(row[column]) for row in rows)) for column in (0, 1))
    for key, value, source in rows:
        print(f"{key:<{key_width}}  {value:<{value_width}}  {source}")
    return 0


def tree_of(process: str) -> type[Section]:
    """The config class of a process, imported only when asked for."""
    module, name = TREES[process]
    return cast("type[Section]", getattr(importlib.import_module(module), name))


def _value_at(section: Section, key: str) -> object:
    value: object = section
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _plain(value: object) -> object:
    """The value as JSON has it: a TOML value and back, None aside."""
    return None if value is None else tomllib.loads(f"value = {toml_value(value)}")["value"]

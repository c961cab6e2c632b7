"""Typed configuration: one pydantic tree per process, each key documented by the docstring below it.

    file (TOML)  <  environment (HETERORL_SECTION__KEY)  <  command line (--section.key=value)

Every layer becomes dotted settings that remember where they stand; the merged tree is validated once, so that
an error in any layer is one sentence with its place, the value and what is allowed. Secrets are never values,
only file paths.
"""

import argparse
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from services.runtime.config_sources import (
    KeyPath,
    Setting,
    merge,
    nest,
    read_environment,
    read_file,
    read_overrides,
)
from services.runtime.errors import ConfigError


class Section(BaseModel):
    """A table of a config file. Unknown keys are errors, and so are infinite numbers where a key does not allow them.
    Attribute docstrings are the keys' documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: object, info: ValidationInfo) -> object:
        """Refuses what the types let through and nobody means: no path (it would be the current folder), true for a
        number (it would be 1), text that no message can carry. A path's ~ is the home, as in a shell."""
        kinds = arms(cls.model_fields[str(info.field_name)].annotation)
        if Path in kinds and isinstance(value, str):
            if not value or "\0" in value:
                raise ValueError("must be a path")
            return os.path.expanduser(value)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError("must be a number")
        if isinstance(value, str) and str in kinds and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("must be UTF-8 text")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _in_64_bits(cls, value: object, info: ValidationInfo) -> object:
        """Larger ones end a run where they reach a database, a message or a library. Data (`Any`) may be larger."""
        counts = int in arms(cls.model_fields[str(info.field_name)].annotation)
        if counts and isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ValueError("must be an integer of 64 bits")
        return value


Annotation: TypeAlias = Any
"""A type as pydantic holds it. This file and config_render.py are the only ones that take types apart."""

TreeT = TypeVar("TreeT", bound=Section)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved(Generic[TreeT]):
    """A validated tree and, for every dotted key, where its value came from."""

    value: TreeT
    sources: Mapping[str, str]
    """dotted key -> "file run.toml", "environment", "command line" or "default"."""


def load(tree: type[TreeT], path: Path | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Resolved[TreeT]:
    """Resolves one process's configuration.

    overrides: words of the form `--section.key=value`. environ: the process environment (HETERORL_* counts).
    Raises InputMissingError (no such file), UsageError (a word is not `--key=value`), ConfigError (else).
    """
    settings: dict[KeyPath, Setting] = {}
    if path is not None:
        _require_tables(tree, from_file := read_file(path))
        merge(settings, from_file)
    top_keys = [
        name
        for name, field in tree.model_fields.items()
        if section_of(field.annotation) is None or types.NoneType in arms(field.annotation)
    ]
    for texts in (read_environment(environ, top_keys, _all_keys(tree)), read_overrides(overrides)):
        layer = {key: _typed(tree, key, text) for key, text in texts.items()}
        _require_tables(tree, layer)
        merge(settings, layer)
    try:
        value = tree.model_validate(nest(settings))
    except ValidationError as error:
        raise ConfigError(_sentence(tree, settings, error)) from None
    return Resolved(value=value, sources={key: _source(settings, key) for key in leaf_keys(value)})


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives a verb `-c FILE` as `arguments.config`, and `--section.key=value` words as `arguments.overrides`.

    argparse cannot know the words beforehand: `services.cli` leaves what it does not know to a verb that has these.
    """
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="TOML config file")
    parser.set_defaults(overrides=[])
    parser.epilog = "Every key can be set as --section.key=value or HETERORL_SECTION__KEY; see `heterorl config`."


def leaf_keys(section: Section) -> list[str]:
    """Dotted names of all keys that hold a value, in the order of the class."""
    keys: list[str] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        keys += [f"{name}.{key}" for key in leaf_keys(value)] if isinstance(value, Section) else [name]
    return keys


def section_of(annotation: Annotation) -> type[Section] | None:
    """The Section class behind `Section`, `Section | None` or `Annotated[Section, ...]`."""
    for arm in arms(annotation):
        if isinstance(arm, type) and issubclass(arm, Section):
            return arm
    return None


def arms(annotation: Annotation) -> list[Annotation]:
    """The members of a union, without `Annotated`; one member for a plain type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return arms(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [arm for member in get_args(annotation) for arm in arms(member)]
    return [annotation]


def _child(annotation: Annotation, key: str | int) -> Annotation:
    """The type below `key`, or None where the type has no such key."""
    for arm in arms(annotation):
        if isinstance(arm, type) and issubclass(arm, BaseModel):
            if key in arm.model_fields:
                return arm.model_fields[str(key)].annotation
        elif get_origin(arm) in (dict, Mapping, list, tuple, Sequence) and get_args(arm):
            return get_args(arm)[1 if get_origin(arm) in (dict, Mapping) else 0]
    return None


def _annotation_at(tree: type[Section], key: KeyPath) -> Annotation:
    """The type of a dotted key, or None where there is no such key."""
    annotation: Annotation = tree
    for part in key:
        annotation = _child(annotation, part)
    return annotation


def _is_plain(annotation: Annotation) -> bool:
    """Whether the type is known, and nothing can stand below it."""
    return annotation is not None and all(
        get_origin(arm) is Literal
        or (get_origin(arm) is None and isinstance(arm, type) and not issubclass(arm, BaseModel | dict | Mapping))
        for arm in arms(annotation)
    )


def _require_tables(tree: type[Section], layer: Mapping[KeyPath, Setting]) -> None:
    """Raises ConfigError for `section = 3`, and for a table under a key that holds a plain value. Before the layer is
    merged: a stronger one with a key of that section, or that key, would take its place, and nobody would hear."""
    for key, setting in layer.items():
        for above in (key[:depth] for depth in range(1, len(key) + isinstance(setting.value, dict))):
            if _is_plain(_annotation_at(tree, above)):
                name = ".".join(above)
                raise ConfigError(f"{setting.place(above)}: {name} is a table, but must be a plain value")
        annotation = _annotation_at(tree, key)
        unset = setting.value is None and types.NoneType in arms(annotation)
        if section_of(annotation) is not None and not unset and not isinstance(setting.value, dict):
            name = ".".join(key)
            raise ConfigError(f"{setting.place(key)}: {name} is {_shown(setting.value)}, but must be a table")


def _typed(tree: type[Section], key: KeyPath, setting: Setting) -> Setting:
    """Text from the environment or the command line, as the value that its key's type asks for.

    Scalars stay text: pydantic reads numbers and booleans. `none` unsets an optional key. A list may be a
    TOML array or comma-separated words.
    """
    text = str(setting.value)
    members = arms(_annotation_at(tree, key))
    if types.NoneType in members and text.lower() == "none":
        return setting.with_value(None)
    if any(get_origin(arm) in (list, tuple, Sequence, dict, Mapping, set, frozenset) for arm in members):
        return setting.parsed_as_container()
    return setting


def _source(settings: Mapping[KeyPath, Setting], key: str) -> str:
    parts = tuple(key.split("."))
    for path, setting in reversed(list(settings.items())):
        if path[: len(parts)] == parts or parts[: len(path)] == path:
            return setting.source
    return "default"


def _sentence(tree: type[Section], settings: Mapping[KeyPath, Setting], error: ValidationError) -> str:
    """The first fault; unknown keys come first, because a misspelt key is often also a missing one."""
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return _describe(tree, settings, faults[0]) + more


def _describe(tree: type[Section], settings: Mapping[KeyPath, Setting], fault: ErrorDetails) -> str:
    key = _known_part(tree, fault["loc"]) if fault["type"] != "extra_forbidden" else fault["loc"]
    name = ".".join(str(part) for part in key)
    place = _place(settings, tuple(str(part) for part in key))
    if fault["type"] == "extra_forbidden":
        return f"{place}unknown key {name}; {_suggestion(tree, key)}"
    if fault["type"] == "missing":
        variable = "HETERORL_" + name.upper().replace(".", "__")
        return f"{place}{name} is missing: set it in the file, as {variable}=… or as --{name}=…"
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if fault["type"] == "model_type":
        message = "must be a table"
    if not name:
        return f"{place}{message}"
    if isinstance(fault["input"], dict | Section) and fault["type"] == "value_error":
        return f"{place}{name}: {message}"
    joint = ", but " if message.startswith("must") else ": "
    return f"{place}{name} is {_shown(fault['input'])}{joint}{message}"


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, Path) else repr(str(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _known_part(tree: type[Section], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Pydantic appends the names of union members to a location; a key ends where the types do."""
    annotation: Annotation = tree
    for depth, part in enumerate(location):
        annotation = _child(annotation, part)
        if annotation is None:
            return location[:depth]
    return location


def _place(settings: Mapping[KeyPath, Setting], key: KeyPath) -> str:
    """Where the nearest setting at or above `key` stands, ending in ": "."""
    for length in range(len(key), 0, -1):
        for path, setting in reversed(list(settings.items())):
            if path[:length] == key[:length]:
                in_list = key[length : length + 1] and key[length].isdigit()  # tables of a list share their name
                return f"{setting.origin if in_list else setting.place(key[:length])}: "
    origins = dict.fromkeys(setting.origin for setting in settings.values())
    return f"{next(iter(origins))}: " if origins else ""


def _suggestion(tree: type[Section], key: tuple[int | str, ...]) -> str:
    annotation: Annotation = tree
    for part in key[:-1]:
        annotation = _child(annotation, part)
    parent = section_of(annotation)
    siblings = list(parent.model_fields) if parent else []
    prefix = "".join(f"{part}." for part in key[:-1])
    if near := get_close_matches(str(key[-1]), siblings, n=1):
        return f"did you mean {prefix}{near[0]}?"
    if elsewhere := [name for name in _all_keys(tree) if name.rsplit(".", 1)[-1] == key[-1]]:
        return f"did you mean {elsewhere[0]}?"
    return f"known keys here: {', '.join(siblings)}"


def _all_keys(tree: type[Section]) -> list[str]:
    keys: list[str] = []
    for name, field in tree.model_fields.items():
        keys.append(name)
        if section := section_of(cast(Annotation, field.annotation)):
            keys += [f"{name}.{key}" for key in _all_keys(section)]
    return keys

"""A config class as a commented TOML file: every key with its documentation, what is allowed, and its value.

`deploy/config/*.toml` and `heterorl config default` are this text, so they cannot drift from the classes.
"""

import enum
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from services.runtime.config import Section, arms, section_of

_WIDTH = 108


def render_toml(tree: type[Section], values: Section | None = None) -> str:
    """The whole tree as TOML. Without `values`, the defaults; a required or unset key stands as a comment."""
    heading = _comment(tree.__doc__ or "")
    return "\n".join([*heading, *([""] if heading else []), *_table(tree, values, ())]).strip() + "\n"


def toml_value(value: object) -> str:
    """One value in TOML's syntax. A dataclass of paths and enums becomes their text."""
    match value:
        case bool():
            return "true" if value else "false"
        case enum.Enum():
            return toml_value(value.value)
        case int():
            return str(value)
        case float():
            return _float(value)
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)
        case Section():
            return toml_value({name: getattr(value, name) for name in type(value).model_fields})
        case Mapping():
            items = cast(Mapping[str, object], value).items()
            return "{" + ", ".join(f"{_key(name)} = {toml_value(item)}" for name, item in items) + "}"
        case Sequence() | set() | frozenset():
            return "[" + ", ".join(toml_value(item) for item in cast(Sequence[object], value)) + "]"
        case _:
            return json.dumps(str(value))


def _float(value: float) -> str:
    return repr(value) if math.isfinite(value) else str(value)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)


def _table(tree: type[Section], values: Section | None, path: tuple[str, ...]) -> list[str]:
    """Scalars first, then the tables below: TOML has no way back to a parent table."""
    fields = tree.model_fields
    lines = [line for name in fields if not _is_table(fields[name]) for line in _entry(name, fields[name], values)]
    for name, field in fields.items():
        child = getattr(values, name) if values is not None else _default(field)
        below = (*path, name)
        if (row := _row_of(field)) is not None:
            lines += _rows(row, field, cast(Sequence[Section], child), below)
            continue
        section = section_of(field.annotation)
        if section is None:
            continue
        body = _table(section, child if isinstance(child, Section) else None, below)
        if child is None and type(None) in arms(field.annotation):
            body = [f"# {line}" if line and not line.startswith(("#", "[")) else line for line in body]
            header = f"# [{'.'.join(below)}]"
        else:
            header = f"[{'.'.join(below)}]"
        lines += ["", *_comment(field.description or _own_doc(section)), header, *body]
    return lines


def _rows(row: type[Section], field: FieldInfo, children: Sequence[Section], path: tuple[str, ...]) -> list[str]:
    """A list of sections: one `[[table]]` each."""
    lines: list[str] = []
    for child in children:
        lines += ["", *_comment(field.description or _own_doc(row)), f"[[{'.'.join(path)}]]"]
        lines += _table(row, child, path)
    return lines or ["", *_comment(field.description or _own_doc(row)), f"# [[{'.'.join(path)}]]"]


def _is_table(field: FieldInfo) -> bool:
    return section_of(field.annotation) is not None or _row_of(field) is not None


def _row_of(field: FieldInfo) -> type[Section] | None:
    """The class of a list's members, where those are sections."""
    for arm in arms(field.annotation):
        if get_origin(arm) is list:
            return section_of(get_args(arm)[0])
    return None


def _own_doc(section: type[Section]) -> str:
    return (section.__dict__.get("__doc__") or "") if section is not Section else ""


def _entry(name: str, field: FieldInfo, values: Section | None) -> list[str]:
    value = getattr(values, name) if values is not None else _default(field)
    allowed = _allowed(field)
    lines = _comment((field.description or "").strip() + (f" [{allowed}]" if allowed else ""))
    if value is PydanticUndefined:
        return [*lines, f"# {name} =    (required)"]
    if value is None:
        return [*lines, f"# {name} =    (unset)"]
    return [*lines, f"{name} = {toml_value(value)}"]


def _default(field: FieldInfo) -> object:
    return cast(object, field.get_default(call_default_factory=True, validated_data={}))


def _allowed(field: FieldInfo) -> str:
    """What a key accepts beyond its type: the members of a closed set, and bounds."""
    for arm in arms(field.annotation):
        if get_origin(arm) is Literal:
            return "one of: " + ", ".join(str(choice) for choice in get_args(arm))
        if isinstance(arm, type) and issubclass(arm, enum.Enum):
            return "one of: " + ", ".join(str(cast(Any, choice).value) for choice in arm)
    return ", ".join(word for item in field.metadata if (word := _bound(item)))


def _bound(item: object) -> str:
    match item:
        case annotated_types.Gt(gt=bound):
            return f"> {bound}"
        case annotated_types.Ge(ge=bound):
            return f"≥ {bound}"
        case annotated_types.Lt(lt=bound):
            return f"< {bound}"
        case annotated_types.Le(le=bound):
            return f"≤ {bound}"
        case _:
            return ""


def _comment(text: str) -> list[str]:
    words = " ".join(text.split())
    return [f"# {line}" for line in textwrap.wrap(words, _WIDTH - 2)] if words else []

"""The three places a setting can come from, each read into dotted keys that remember where they stand."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias, cast

from services.runtime.errors import ConfigError, InputMissingError, UsageError

KeyPath: TypeAlias = tuple[str, ...]

PREFIX = "HETERORL_"
_OVERRIDE = re.compile(r"--([a-z0-9_-]+(?:\.[a-z0-9_-]+)*)=(.*)", re.DOTALL)
_HEADER = re.compile(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_.\"' -]+?)\s*=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    value: object
    source: str
    """What `heterorl config show` prints: "file run.toml", "environment", "command line"."""
    origin: str
    """What an error message starts with: the file, the variable or the option."""
    text: str = ""
    """The file's text, to find a key's line when an error needs it."""

    def with_value(self, value: object) -> "Setting":
        return replace(self, value=value)

    def parsed_as_container(self) -> "Setting":
        """`[1, 2]` and `{a = 1}` are TOML; anything else is words between commas."""
        text = str(self.value).strip()
        try:
            return self.with_value(tomllib.loads(f"value = {text}")["value"])
        except (ValueError, RecursionError):  # TOMLDecodeError, and integers and depths that Python does not read
            return self.with_value([word.strip() for word in text.split(",") if word.strip()])

    def place(self, key: KeyPath) -> str:
        """The origin, with the key's line where the origin is a file."""
        line = _line_of(self.text, key) if self.text else None
        return self.origin if line is None else f"{self.origin}, line {line}"


def read_file(path: Path) -> dict[KeyPath, Setting]:
    """The keys of a TOML file. Raises InputMissingError, or ConfigError if it is not readable TOML."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = _flatten(tomllib.loads(text))
    except FileNotFoundError:
        raise InputMissingError(f"there is no config file {path}") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ConfigError(f"config file {path} is not valid TOML: its values are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, and integers of thousands of digits
        reason = str(error).replace("(at ", "at ").removesuffix(")")
        raise ConfigError(f"config file {path} is not valid TOML: {reason}") from None
    setting = Setting(value=None, source=f"file {path}", origin=str(path), text=text)
    return {key: setting.with_value(value) for key, value in values.items()}


def read_environment(
    environ: Mapping[str, str], top_keys: Sequence[str], all_keys: Sequence[str]
) -> dict[KeyPath, Setting]:
    """HETERORL_SECTION__KEY variables, with the case folded.

    A name without `__` may belong to something else (HETERORL_FAILPOINTS): it counts only if it is a
    top-level key, and is an error if it nearly is one, or is one of `all_keys` (dotted) but for an underscore.
    """
    underscored = {key.replace(".", "_"): PREFIX + key.replace(".", "__").upper() for key in all_keys if "." in key}
    settings: dict[KeyPath, Setting] = {}
    for name in sorted(environ):
        if not name.startswith(PREFIX):
            continue
        key = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if len(key) == 1 and key[0] not in top_keys:
            near = get_close_matches(key[0], top_keys, n=1, cutoff=0.75)
            if meant := underscored.get(key[0]) or (PREFIX + near[0].upper() if near else None):
                raise ConfigError(f"environment variable {name}: unknown key {key[0]}; did you mean {meant}?")
            continue
        origin = f"environment variable {name}"
        settings[key] = Setting(value=environ[name], source="environment", origin=origin)
    return settings


def read_overrides(words: Sequence[str]) -> dict[KeyPath, Setting]:
    """`--section.key=value` words. Raises UsageError for a word of another form."""
    settings: dict[KeyPath, Setting] = {}
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            raise UsageError(f"{word!r} is neither an option nor a setting of the form --section.key=value")
        dotted = match[1].replace("-", "_")
        key = tuple(dotted.split("."))
        merge(settings, {key: Setting(value=match[2], source="command line", origin=f"option --{dotted}")})
    return settings


def merge(settings: dict[KeyPath, Setting], layer: Mapping[KeyPath, Setting]) -> None:
    """Puts a stronger layer over `settings`: a key replaces itself and whatever stood above or below it."""
    for key, setting in layer.items():
        clashing = [old for old in settings if old[: len(key)] == key or key[: len(old)] == old]
        for old in clashing:
            del settings[old]
        settings[key] = setting


def nest(settings: Mapping[KeyPath, Setting]) -> dict[str, object]:
    """Dotted settings as the nested tables that pydantic reads."""
    root: dict[str, object] = {}
    for key, setting in settings.items():
        table = root
        for part in key[:-1]:
            table = cast(dict[str, object], table.setdefault(part, {}))
        table[key[-1]] = setting.value
    return root


def _flatten(table: Mapping[str, object], prefix: KeyPath = ()) -> dict[KeyPath, object]:
    flat: dict[KeyPath, object] = {}
    for name, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(cast(dict[str, object], value), (*prefix, name))
        else:
            flat[(*prefix, name)] = value
    return flat


def _line_of(text: str, key: KeyPath) -> int | None:
    """The line where a key is assigned, from headers and assignments alone; tomllib keeps no positions."""
    header: KeyPath = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _HEADER.match(line):
            header = _split(match[1])
            if header == key:
                return number
        elif (match := _ASSIGNMENT.match(line)) and key[: len(path := (*header, *_split(match[1])))] == path:
            return number
    return None


def _split(dotted: str) -> KeyPath:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))

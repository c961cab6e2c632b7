"""Cases for `heterorl loss`: read from JSON, checked to the last number, evaluated in float64.

The checks run on plain lists before torch is imported, so that a bad file fails fast and in one sentence.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from services.learner.losses.settings import LossSettings
from services.runtime.errors import BadInputError, InputMissingError

TOKEN_KEYS = ("learner_logprobs", "sampler_logprobs", "proximal_logprobs", "reference_logprobs")
CASE_KEYS = ("name", "loss", *TOKEN_KEYS, "mask", "rewards", "group_size", "overlong", "staleness", "options")
REQUIRED_KEYS = ("loss", "learner_logprobs", "sampler_logprobs", "rewards", "group_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCase:
    """One checked case: B rows, those of one group adjacent. Rows are ragged; NaN stands for null."""

    name: str
    settings: LossSettings
    logprobs: Mapping[str, list[list[float]]]
    """One of `TOKEN_KEYS` -> rows; the first two are always there."""
    mask: list[list[bool]]
    rewards: list[float]
    group_size: int
    overlong: list[bool] | None
    staleness: list[float] | None
    """Versions, 0 or more."""


def read_cases(path: Path) -> list[LossCase]:
    """Cases of a file that holds one case or a list of them.

    Raises InputMissingError where there is no file, and BadInputError, naming the case, for anything wrong in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputMissingError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} cannot be read: {error}") from None
    try:
        content: object = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise BadInputError(f"{path} is not JSON: {error}") from None
    entries = cast("list[object]", content) if isinstance(content, list) else [content]
    if not entries:
        raise BadInputError(f"{path} holds no case")
    return [_case(entry, f"case {number}") for number, entry in enumerate(entries, start=1)]


def _case(entry: object, place: str) -> LossCase:
    if not isinstance(entry, dict):
        raise BadInputError(f"{place} is not a JSON object")
    fields = cast("dict[str, object]", entry)
    name = fields.get("name", place)
    if not isinstance(name, str):
        raise BadInputError(f'{place}: "name" must be a string')
    place = f"case {name!r}" if "name" in fields else place
    for key in fields:
        if key not in CASE_KEYS:
            raise BadInputError(f'{place}: unknown key "{key}"{_nearest(key, CASE_KEYS)}')
    for key in REQUIRED_KEYS:
        if key not in fields:
            raise BadInputError(f'{place}: "{key}" is missing')
    settings = _settings(fields, place)
    logprobs = {key: _rows(fields[key], f'{place}: "{key}"') for key in TOKEN_KEYS if key in fields}
    learner = logprobs["learner_logprobs"]
    mask = _mask(fields["mask"], place) if "mask" in fields else [[True] * len(row) for row in learner]
    _check_shapes(logprobs, mask, place)
    _check_values(logprobs, mask, place)
    rewards = [_number(value, f'{place}: "rewards"') for value in _list(fields["rewards"], f'{place}: "rewards"')]
    overlong = fields.get("overlong")
    marks = None if overlong is None else _flags(_list(overlong, f'{place}: "overlong"'), f'{place}: "overlong"')
    staleness = _staleness(fields.get("staleness"), place)
    for key, values in (("rewards", rewards), ("overlong", marks), ("staleness", staleness)):
        if values is not None and len(values) != len(learner):
            raise BadInputError(f'{place}: "{key}" has {len(values)} values but there are {len(learner)} rows')
    return LossCase(
        name=name,
        settings=settings,
        logprobs=logprobs,
        mask=mask,
        rewards=rewards,
        group_size=_group_size(fields["group_size"], len(learner), place),
        overlong=marks,
        staleness=staleness,
    )


def _settings(fields: Mapping[str, object], place: str) -> LossSettings:
    options = fields.get("options")
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise BadInputError(f'{place}: "options" must be an object of [loss] keys')
    chosen = cast("dict[str, object]", options)
    known = [key for key in LossSettings.model_fields if key != "name"]
    for key in chosen:
        if key not in known:
            raise BadInputError(f'{place}: unknown option "{key}"{_nearest(key, known)}')
    if not isinstance(fields["loss"], str):
        raise BadInputError(f'{place}: "loss" must be a string')
    try:
        return LossSettings.model_validate({"name": fields["loss"], **chosen})
    except ValidationError as error:
        fault = error.errors()[0]
        message = fault["msg"].removeprefix("Value error, ")
        key = fault["loc"][0] if fault["loc"] else "options"
        where = "" if key == "name" else f'option "{key}": '
        raise BadInputError(f"{place}: {where}{message[:1].lower()}{message[1:]}") from None


def _group_size(value: object, rows: int, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInputError(f'{place}: "group_size" must be a whole number of 2 or more')
    if value == 1:
        raise BadInputError(
            f"{place}: with group_size 1 the advantage is undefined (a reward minus its own mean); use 2 or more"
        )
    if rows % value:
        raise BadInputError(f"{place}: {rows} rows are not a multiple of group_size {value}: a group is cut in two")
    return value


def _check_shapes(logprobs: Mapping[str, list[list[float]]], mask: list[list[bool]], place: str) -> None:
    learner = logprobs["learner_logprobs"]
    if not learner:
        raise BadInputError(f"{place}: there are no rows")
    for key, rows in {**logprobs, "mask": mask}.items():
        if len(rows) != len(learner):
            raise BadInputError(f'{place}: "{key}" has {len(rows)} rows but "learner_logprobs" has {len(learner)}')
        for number, (row, model) in enumerate(zip(rows, learner, strict=True)):
            if len(row) != len(model):
                sizes = f'{len(row)} tokens but "learner_logprobs" has {len(model)}'
                raise BadInputError(f'{place}: row {number} of "{key}" has {sizes}')


def _check_values(logprobs: Mapping[str, list[list[float]]], mask: list[list[bool]], place: str) -> None:
    for key, rows in logprobs.items():
        for number, (row, keep) in enumerate(zip(rows, mask, strict=True)):
            above = [t for t, (value, kept) in enumerate(zip(row, keep, strict=True)) if kept and value > 0.0]
            if above:
                what = f'"{key}" row {number}, token {above[0]} is {row[above[0]]}'
                raise BadInputError(f"{place}: {what}: a log-prob cannot be above 0")


def _rows(value: object, what: str) -> list[list[float]]:
    return [
        [math.nan if item is None else _number(item, what) for item in _list(row, f"a row of {what}")]
        for row in _list(value, what)
    ]


def _mask(value: object, place: str) -> list[list[bool]]:
    return [
        _flags(_list(row, f'{place}: a row of "mask"'), f'{place}: "mask"') for row in _list(value, f'{place}: "mask"')
    ]


def _flags(values: Sequence[object], what: str) -> list[bool]:
    if any(value not in (0, 1) for value in values):
        raise BadInputError(f"{what} may hold only 0, 1, true and false")
    return [bool(value) for value in values]


def _staleness(value: object, place: str) -> list[float] | None:
    if value is None:
        return None
    what = f'{place}: "staleness"'
    versions = [_number(item, what) for item in _list(value, what)]
    if not all(math.isfinite(one) and one >= 0.0 for one in versions):
        raise BadInputError(f"{what} must hold versions, 0 or more")
    return versions


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise BadInputError(f"{what} must be a list")
    return cast("list[object]", value)


def _number(value: object, what: str) -> float:
    if not isinstance(value, int | float):
        raise BadInputError(f"{what} holds {json.dumps(value)} where a number must stand")
    try:
        return float(value)
    except OverflowError:
        raise BadInputError(f"{what} holds a number that is too large") from None


def _nearest(key: str, known: Sequence[str]) -> str:
    near = get_close_matches(key, known, n=3, cutoff=0.5)
    return (
        f": nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}"
        if near
        else f": known are {', '.join(known)}"
    )

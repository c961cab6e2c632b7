"""Prompts with reference answers from a JSONL file, and the order in which a run leases them.

Layouts, by key: {"prompt", "answer"}, GSM8K {"question", "answer"} and MATH {"problem", "solution"}. An answer is kept
whole ("... #### 18" too): what in it counts is the graders' business.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias, cast

from services.runtime.errors import BadInputError, InputMissingError
from services.wire.types import Prompt

_PROMPT_KEYS = ("prompt", "question", "problem")
_ANSWER_KEYS = ("answer", "solution")
_MOST_BYTES = 2 << 20
"""Of one prompt with everything beside it: half of the largest message."""

_Record: TypeAlias = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """`prompts` in the order of the file's lines; `sha256` covers their ids, so it changes with any line."""

    path: Path
    prompts: tuple[Prompt, ...]
    sha256: str

    @classmethod
    def load(cls, path: Path, prompt_key: str = "", answer_key: str = "") -> "Dataset":
        """Reads the file; empty keys are detected on the first line and then hold for all lines.

        Raises InputMissingError when the file is not there, and BadInputError, naming file and line, for a line that is
        not a JSON object with a text prompt and an answer, and for a file without any.
        """
        prompts: list[Prompt] = []
        for place, record in _records(path):
            prompt_key = prompt_key or _detect(record, _PROMPT_KEYS, "prompt", place)
            answer_key = answer_key or _detect(record, _ANSWER_KEYS, "answer", place)
            prompts.append(_prompt(record, prompt_key, answer_key, len(prompts), place))
        if not prompts:
            raise BadInputError(f"{path} holds no prompts: one JSON object per line is needed")
        ids = "\n".join(prompt.prompt_id for prompt in prompts)
        return cls(path=path, prompts=tuple(prompts), sha256=hashlib.sha256(ids.encode()).hexdigest())


def _records(path: Path) -> Iterator[tuple[str, _Record]]:
    """Each line that is not blank, with "file, line N" for messages."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise InputMissingError(f"there is no data set {path}") from None
    except OSError as error:
        raise BadInputError(f"data set {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = cast(object, json.loads(line.decode()))
        except UnicodeDecodeError:
            why = "one JSON object per line is needed; compressed files and Parquet are not read"
            raise BadInputError(f"{place}: not UTF-8 text ({why})") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
            raise BadInputError(f"{place}: not JSON ({error}): one object per line is needed") from None
        if not isinstance(record, dict):
            raise BadInputError(f"{place}: a JSON object is needed, not {type(record).__name__}")
        yield place, cast(_Record, record)


def _detect(record: _Record, candidates: tuple[str, ...], what: str, place: str) -> str:
    for key in candidates:
        if key in record:
            return key
    known = ", ".join(f'"{key}"' for key in candidates)
    raise BadInputError(f"{place}: no key for the {what} (looked for {known}): set data.{what}_key")


def _prompt(record: _Record, prompt_key: str, answer_key: str, index: int, place: str) -> Prompt:
    text = _text(record, prompt_key, place)
    answer = _text(record, answer_key, place)
    rest = {key: value for key, value in record.items() if key not in (prompt_key, answer_key)}
    metadata = json.dumps(rest, sort_keys=True) if rest else ""
    size = sum(len(part.encode()) for part in (text, answer, metadata))
    if size > _MOST_BYTES:
        raise BadInputError(
            f"{place}: {size} bytes, at most {_MOST_BYTES} fit a message: drop keys that no grader needs"
        )
    digest = hashlib.sha256(f"{len(text)}:{text}{answer}".encode()).hexdigest()
    return Prompt(prompt_id=f"{index}-{digest[:16]}", text=text, answer=answer, metadata_json=metadata)


def _text(record: _Record, key: str, place: str) -> str:
    if key not in record:
        raise BadInputError(f'{place}: key "{key}" is missing')
    value = record[key]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole or (isinstance(value, float) and math.isfinite(value)):  # NaN is how some tools write that there is none
        value = str(value)
    if isinstance(value, list | dict):
        raise BadInputError(f'{place}: "{key}" must be text, and is a list or an object (messages are not read)')
    if not isinstance(value, str) or not value.strip():
        raise BadInputError(f'{place}: "{key}" must be text that is not empty')
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate: JSON can spell it, protobuf cannot carry it
        raise BadInputError(f'{place}: "{key}" is not valid Unicode') from None
    return value


class PromptOrder:
    """The endless sequence of training prompts: number n is the same prompt in every process with the same seed.

    Because of that a restarted learner needs only a number to go on, and can check a group of a lease that an earlier
    process granted. With `shuffle`, each pass over the data has its own order.
    """

    def __init__(self, dataset: Dataset, seed: int, shuffle: bool) -> None:
        self._prompts = dataset.prompts
        self._seed = seed
        self._shuffle = shuffle
        self._permutation = lru_cache(maxsize=4)(self._permute)

    def at(self, number: int) -> Prompt:
        """The prompt with this number, counted from 0 over all passes."""
        turn, place = divmod(number, len(self._prompts))
        return self._prompts[self._permutation(turn)[place] if self._shuffle else place]

    def __len__(self) -> int:
        return len(self._prompts)

    def _permute(self, turn: int) -> tuple[int, ...]:
        indices = list(range(len(self._prompts)))
        random.Random(f"{self._seed}:{turn}").shuffle(indices)
        return tuple(indices)

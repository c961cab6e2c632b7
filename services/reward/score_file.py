"""`heterorl reward score`: the lines of a file through the pool, and the scores in the order of the lines."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from services.reward.pool import Pool
from services.reward.scorer import Score, ScoreRequest, Status
from services.reward.spec import GraderSpec, parse_graders_text
from services.runtime.errors import BadInputError, EngineError, InputMissingError, ScoreError, StorageError

IN_FLIGHT_PER_WORKER = 8
_TEXTS = ("completion", "answer", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the file; `number` counts from 1."""

    number: int
    request: ScoreRequest


def score_file(path: Path, graders: str, pool: Pool, *, as_json: bool) -> int:
    """Prints one line per case and returns 0.

    Raises InputMissingError, BadInputError (a line that does not parse, by number), ScoreError (graders, or a reference
    answer, by line number), EngineError (a grader failed).
    """
    specs = parse_graders_text(graders)
    pool.check(specs)
    cases = list(read_cases(path))
    asyncio.run(_score(cases, specs, pool, as_json))
    return 0


def read_cases(path: Path) -> Iterator[Case]:
    """The cases of a JSONL file; blank lines are passed over. Raises InputMissingError, StorageError, BadInputError."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputMissingError(f"There is no file {path}; give --cases a JSONL file.") from None
    except OSError as error:
        raise StorageError(f"The file {path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Case(number=number, request=_read_case(line, f"Line {number} of {path}"))


def _read_case(line: bytes, where: str) -> ScoreRequest:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadInputError(f'{where} is not an object; write {{"completion": "...", "answer": "..."}}.')
    entry = cast("dict[str, object]", value)
    for name in _TEXTS:
        if not isinstance(entry.get(name, "" if name == "prompt" else None), str):
            raise BadInputError(f"{where} needs {name!r} as a text.")
    metadata = entry.get("metadata", {})
    if not isinstance(metadata, dict):
        raise BadInputError(f"{where} has metadata that is not an object.")
    return ScoreRequest(
        prompt=str(entry.get("prompt", "")),
        answer=str(entry["answer"]),
        completion=str(entry["completion"]),
        metadata=cast("dict[str, object]", metadata),
    )


async def _score(cases: Sequence[Case], specs: Sequence[GraderSpec], pool: Pool, as_json: bool) -> None:
    async with pool:
        async for score in _in_order(cases, specs, pool):
            print(_json_line(score) if as_json else _table_line(score), flush=True)


async def _in_order(cases: Sequence[Case], specs: Sequence[GraderSpec], pool: Pool) -> AsyncIterator[Score]:
    """Scores a bounded number ahead of what is printed."""
    ahead: asyncio.Queue[asyncio.Task[Score]] = asyncio.Queue()
    waiting = iter(cases)
    try:
        while True:
            while ahead.qsize() < IN_FLIGHT_PER_WORKER * pool.workers and (case := next(waiting, None)) is not None:
                ahead.put_nowait(asyncio.create_task(_score_case(case, specs, pool)))
            if ahead.empty():
                return
            yield await ahead.get_nowait()
    finally:
        while not ahead.empty():
            ahead.get_nowait().cancel()


async def _score_case(case: Case, specs: Sequence[GraderSpec], pool: Pool) -> Score:
    try:
        (score,) = await pool.score_group([case.request], specs)
    except ScoreError as error:
        raise ScoreError(f"Line {case.number}: {error}") from None
    if score.status is Status.INFRASTRUCTURE_FAILURE:
        raise EngineError(f"Line {case.number} has no reward: {score.reason}.")
    return score


def _json_line(score: Score) -> str:
    return json.dumps(
        {
            "reward": score.reward,
            "extracted": score.extracted,
            "reason": score.reason,
            "seconds": round(score.seconds, 6),
        }
    )


def _table_line(score: Score) -> str:
    return f"{score.reward:8.3f}  {score.extracted or '-'!s:.40}  {score.reason}  ({score.seconds * 1000:.1f} ms)"

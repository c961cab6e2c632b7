"""`heterorl lab staleness`: a grid of losses, learning rates, delays and seeds, one JSON file per finished cell.

    grid ─► cells without a file ─► worker processes, one thread each ─► OUT/cells/KEY.json ─► table, JSON, plots

A run that is cut goes on where it was: a cell's file is written whole or not at all, and named by all its settings.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.lab.arena import Arena, Cell
from services.lab.experiment import CellResult, run_cell
from services.learner.config import OptimizerSection
from services.learner.losses.settings import LossName, LossSettings
from services.runtime.errors import BadInputError, EngineError, UsageError
from services.runtime.files import atomic_write, storage_errors
from services.sampler.delays import DelayKind, DelayModel, DelaySection

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A loss as the command line names it: "gepo", or with keys, "gepo_fresh:fresh_versions=0"."""

    label: str
    settings: LossSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """All that is crossed, in the order in which tables show it."""

    contenders: tuple[Contender, ...]
    rates: tuple[float, ...]
    delays: tuple[str, ...]
    seeds: int

    def cells(self, arena: Arena, links: str) -> Iterator[tuple[Contender, Cell]]:
        """Seed by seed, so that a grid that is cut has fewer seeds and not fewer columns."""
        for seed, delay, rate, contender in itertools.product(
            range(self.seeds), self.delays, self.rates, self.contenders
        ):
            yield contender, make_cell(arena, contender, rate=rate, delay=delay, seed=seed, links=links)


def make_cell(arena: Arena, contender: Contender, *, rate: float, delay: str, seed: int, links: str) -> Cell:
    """`delay`: a number of versions or a kind of delay; `links`: "weights", "rollouts" or "both". Raises UsageError."""
    lag = int(delay) if delay.isdecimal() else None
    section = DelaySection()
    if lag is None:
        if delay not in list(DelayKind) or delay == DelayKind.TRACE:
            kinds = ", ".join(kind for kind in DelayKind if kind is not DelayKind.TRACE)
            raise UsageError(f"--delays: {delay!r} is neither a number of versions nor one of {kinds}")
        model = DelayModel(kind=DelayKind(delay))
        section = DelaySection(
            weights=model if links in ("weights", "both") else DelayModel(),
            rollouts=model if links in ("rollouts", "both") else DelayModel(),
        )
    return Cell(
        arena=arena,
        loss=contender.settings,
        optimizer=OptimizerSection(lr=rate),
        lag_versions=lag,
        delay=section,
        delay_name=delay,
        seed=seed,
    )


def parse_contender(text: str, published_gspo_clip: bool = True) -> Contender:
    """ "name" or "name:key=value:key=value". gspo's clip is .2 / .2, as in the published comparison, unless its keys or
    `published_gspo_clip` say otherwise. Raises UsageError."""
    name, *pairs = text.split(":")
    if name not in list(LossName):
        near = get_close_matches(name, list(LossName), n=3, cutoff=0.0)
        raise UsageError(f"no loss is called {name!r}: nearest are {', '.join(near)}")
    options: dict[str, object] = {"name": name}
    if name in (LossName.GSPO, LossName.GSPO_TOKEN) and published_gspo_clip:
        options |= {"clip_low": 0.2, "clip_high": 0.2}
    keys = [key for key in LossSettings.model_fields if key != "name"]
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in keys:
            near = ", ".join(get_close_matches(key, keys, n=3, cutoff=0.5) or keys)
            raise UsageError(f"--losses {text!r}: {key!r} is not one of the [loss] keys: nearest are {near}")
        options[key] = value
    try:
        return Contender(label=text, settings=LossSettings.model_validate(options))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--losses {text!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def run_grid(cells: Sequence[Cell], out: Path, workers: int, console: Console) -> list[CellResult]:
    """Runs what is missing, in `workers` processes, and returns the results in the order of `cells`.

    Raises StorageError (OUT cannot be written), EngineError (a worker died), and what `run_cell` raises.
    """
    folder = out / "cells"
    with storage_errors(f"make folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not (folder / f"{cell.key}.json").exists()]
    if missing:
        _run_missing(missing, out, min(workers, len(missing)), console, done=len(cells) - len(missing))
    return [read_result(folder / f"{cell.key}.json") for cell in cells]


def finished(pairs: Sequence[tuple[Contender, Cell]], out: Path) -> list[tuple[Contender, Cell]]:
    """Those of `pairs` whose results are in OUT. Raises UsageError where none is."""
    found = [(contender, cell) for contender, cell in pairs if (out / "cells" / f"{cell.key}.json").exists()]
    if not found:
        raise UsageError(f"no cell of this grid is finished in {out / 'cells'}: run without --finished")
    return found


def _run_missing(missing: Sequence[Cell], out: Path, workers: int, console: Console, done: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
    )
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("cells", total=done + len(missing), completed=done)
            futures: list[Future[str]] = [pool.submit(work, cell.model_dump_json(), str(out)) for cell in missing]
            for future in as_completed(futures):
                progress.update(bar, advance=1, description=future.result())
    except BrokenProcessPool as error:
        reason = "a worker process died, perhaps for lack of memory"
        raise EngineError(f"{reason}: run again with fewer --workers") from error
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()  # in the middle of a cell: the next run begins it anew
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with(parent: int) -> None:
    """A worker is ended by the kernel when its parent ends, however it ends: nobody would collect what it computes."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(0)


def work(cell_json: str, out: str) -> str:
    """One cell in a worker process; returns its key. Text in and out: settings and results are JSON."""
    import torch

    torch.set_num_threads(1)  # sums of several threads come in any order, and cells run side by side anyway
    cell = Cell.model_validate_json(cell_json)
    result = run_cell(cell, Path(out) / "bases")
    atomic_write(Path(out) / "cells" / f"{cell.key}.json", result.model_dump_json().encode() + b"\n")
    return cell.key


def read_result(path: Path) -> CellResult:
    """Raises BadInputError for a file that no `work` wrote."""
    try:
        return CellResult.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadInputError(f"{path} is not the result of a cell ({error.error_count()} faults): delete it") from None

"""`heterorl lab`: experiments with the learner's own code. docs/lab.md."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.errors import ConfigError, InputMissingError, UsageError

if TYPE_CHECKING:
    from services.lab.arena import Arena


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="experiment", metavar="EXPERIMENT", required=True)
    _add_staleness(kinds.add_parser("staleness", help="losses under delay: accuracy, variance, KL, with intervals"))
    theory = kinds.add_parser("theory", help="the theorems on small policies: where which weight varies less")
    theory.add_argument("--out", type=Path, default=Path("runs/lab"), help="folder of theory.json and theory.svg")
    theory.add_argument("--points", type=int, default=200, help="points of the Bernoulli grid in each direction (200)")
    theory.add_argument("--group-size", type=int, default=8, help="draws per group (8)")
    theory.add_argument("--json", action="store_true", help="print JSON instead of text")
    replay = kinds.add_parser("replay", help="a run's recorded groups under other losses, by staleness")
    replay.add_argument("--run", type=Path, required=True, metavar="STATE_DIR", help="state_dir of a learner")
    replay.add_argument("--policy", type=Path, default=None, help="policy directory (STATE_DIR/policy)")
    replay.add_argument("--losses", default="gepo,gspo,grpo", help="comma-separated; NAME:key=value sets [loss] keys")
    replay.add_argument("--groups", type=int, default=64, help="most groups of each bucket, the newest ones (64)")
    replay.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    replay.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_staleness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--losses", default="gepo,gspo,grpo", help="comma-separated; NAME:key=value sets [loss] keys")
    parser.add_argument("--delays", default="0,64", help="versions (0,8,64), or kinds of delay (lognormal,weibull)")
    parser.add_argument("--lrs", default="1e-2", help="learning rates")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each cell: 0 to N-1 (3)")
    parser.add_argument("--task", default="fixed", help="fixed, variable or worked")
    parser.add_argument("--policy", default="columns", help="columns, small or large (for a GPU)")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda"')
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (600)")
    parser.add_argument("--links", default="weights", choices=("weights", "rollouts", "both"), help="what is delayed")
    parser.add_argument("--paper-gspo-clip", action="store_true", help="gspo with its own 3e-4/4e-4 instead of .2/.2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another key of the arena")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"), help="folder of results; finished cells are kept")
    parser.add_argument("--finished", action="store_true", help="run nothing: show the cells that are finished")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (2)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")


def run(arguments: argparse.Namespace) -> int:
    match arguments.experiment:
        case "theory":
            return _theory(arguments)
        case "replay":
            return _replay(arguments)
        case _:
            return _staleness(arguments)


def _theory(arguments: argparse.Namespace) -> int:
    from services.lab.theory import bernoulli_grid, findings, gaussian_line
    from services.runtime.files import atomic_write

    if arguments.points < 2 or arguments.group_size < 2:
        raise UsageError("--points and --group-size must be 2 or more")
    grid, line = bernoulli_grid(arguments.points, arguments.group_size), gaussian_line()
    found = findings(grid, line)
    _make(arguments.out)
    atomic_write(arguments.out / "theory.json", json.dumps(found, indent=1).encode() + b"\n")

    from services.lab.plots import draw_theory

    draw_theory(grid, line, arguments.out / "theory.svg")
    if arguments.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in found.items()))
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from services.lab.replay import as_table, read_buckets, replay
    from services.lab.staleness import parse_contender
    from services.learner.data_plane import JOURNAL_FILE
    from services.monitor.views import console

    if not 1 <= arguments.groups < 1 << 63:
        raise UsageError("--groups must be 1 or more, and fit 64 bits")
    losses = [(one.label, one.settings) for one in map(parse_contender, _words(arguments.losses))]
    if any(settings.wants_reference for _, settings in losses):
        raise UsageError('replay holds no reference model: leave kl_target = "reference" out of --losses')
    buckets = read_buckets(arguments.run / JOURNAL_FILE, arguments.groups)
    policy = arguments.policy or arguments.run / "policy"
    if not policy.is_dir():
        raise InputMissingError(f"there is no folder {policy}: --policy takes a policy's, such as the run's export")
    found = list(replay(buckets, policy, losses, device=arguments.device))
    if arguments.json:
        print(json.dumps([one.as_json() for one in found], allow_nan=False))
    else:
        console().print(as_table(found))
    return 0


def _make(folder: Path) -> None:
    from services.runtime.files import storage_errors

    with storage_errors(f"make folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


def _staleness(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from services.lab.staleness import Grid, finished, parse_contender, run_grid
    from services.lab.tables import as_table, compared, lines_of
    from services.monitor.views import console
    from services.runtime.files import atomic_write
    from services.wire.torch_device import torch_device

    if arguments.seeds < 1 or arguments.workers < 1:
        raise UsageError("--seeds and --workers must be 1 or more")
    arena = _arena(arguments)
    grid = Grid(
        contenders=tuple(parse_contender(text, not arguments.paper_gspo_clip) for text in _words(arguments.losses)),
        rates=tuple(_rate(text) for text in _words(arguments.lrs)),
        delays=tuple(_words(arguments.delays)),
        seeds=arguments.seeds,
    )
    cells = grid.cells(arena, arguments.links)
    pairs = list({(contender.label, cell.key): (contender, cell) for contender, cell in cells}.values())
    if arguments.finished:
        pairs = finished(pairs, arguments.out)
    else:
        torch_device(arena.device, "device")
    progress = Console(stderr=True)
    results = run_grid([cell for _, cell in pairs], arguments.out, arguments.workers, progress)
    lines = lines_of([contender.label for contender, _ in pairs], results)
    found = {
        "arena": results[0].cell.arena.model_dump(mode="json"),
        "lines": [line.as_json() for line in lines],
        "against_the_best_other": {
            label: compared(lines, label) for label in dict.fromkeys(one.label for one in lines)
        },
    }
    text = json.dumps(found, allow_nan=False)
    atomic_write(arguments.out / "staleness.json", text.encode() + b"\n")
    if not arguments.no_plots:
        from services.lab.plots import draw_staleness

        for path in draw_staleness(lines, arguments.out):
            progress.print(f"wrote {path}", highlight=False)
    if arguments.json:
        print(text)
    else:
        console().print(as_table(lines, f"{arguments.task} task, {arguments.steps} steps: mean ±95 % interval"))
    return 0


def _arena(arguments: argparse.Namespace) -> "Arena":
    from pydantic import ValidationError

    from services.lab.arena import Arena

    values = {name: getattr(arguments, name) for name in ("task", "policy", "device", "steps")}
    for pair in arguments.set:
        key, mark, value = pair.partition("=")
        if not mark:
            raise UsageError(f"--set {pair}: write KEY=VALUE, for example --set columns=4")
        values[key] = value
    try:
        return Arena.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; docs/lab.md lists the keys") from None


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError("a list on the command line is empty: give at least one value")
    return words


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number") from None
    if not 0 < rate < math.inf:
        raise UsageError(f"a learning rate is above 0, and {text} is not")
    return rate

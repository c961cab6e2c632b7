"""`heterorl demo`: the main job on this machine, in about three minutes."""

import argparse
import asyncio
import datetime as dt
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.errors import UsageError

if TYPE_CHECKING:
    from services.learner.losses.settings import LossName


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results (runs/demo)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, sampling and training")
    parser.add_argument("--loss", default="gepo", help="loss to train with (gepo)")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what the samplers generate with; vllm needs the environment of make setup-vllm (transformers)",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps is not None and arguments.steps < 1:
        raise UsageError(f"--steps {arguments.steps}: the demo takes 1 optimizer step or more")
    import dataclasses

    from rich.console import Console

    from services.lab.demo import Demo
    from services.lab.demo_site import DemoSettings
    from services.lab.demo_summary import print_summary

    settings = DemoSettings(seed=arguments.seed, loss=_loss(arguments.loss), engine=arguments.engine)
    if arguments.steps is not None:
        settings = dataclasses.replace(settings, steps=arguments.steps)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    out = fresh_folder(arguments.out)
    asyncio.run(Demo(out, settings, console).run())
    print_summary(out, console)
    return 0


def _loss(name: str) -> "LossName":
    from services.learner.losses.settings import LossName

    if name not in list(LossName):
        near = get_close_matches(name, list(LossName), n=3, cutoff=0.0)
        raise UsageError(f"no loss is called {name!r}: nearest are {', '.join(near)}")
    return LossName(name)


def fresh_folder(path: Path) -> Path:
    """Makes `path`; a demo that is there already is kept under the time when it was made. Raises UsageError for a
    folder of anything else: nobody's home is to be moved aside."""
    if path.exists() and any(path.iterdir()):
        if not (path / "work" / "pki").is_dir():
            raise UsageError(f"{path} holds other things than a demo: name a folder of its own with --out")
        made = dt.datetime.fromtimestamp(path.stat().st_mtime)
        path.rename(path.with_name(f"{path.name}-{made:%Y%m%d-%H%M%S}"))
    path.mkdir(parents=True, exist_ok=True)
    return path

"""`heterorl top`: a live view of a run, until Ctrl-C or the end of the run."""

import argparse
import asyncio

from services.commands.connection import add_connection_arguments, tls_of
from services.runtime.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_connection_arguments(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between views (1.0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per change instead of the view")


def run(arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.interval <= 3600:
        raise UsageError(f"--interval is {arguments.interval:g}, but must be from 0.1 to 3600 seconds")
    from services.monitor.top import watch

    asyncio.run(watch(arguments.learner, tls_of(arguments), arguments.interval, as_json=arguments.json))
    return 0

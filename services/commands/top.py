"""`heterorl top`: a live view of a run, until Ctrl-C or the end of the run."""

import argparse
import asyncio

from services.commands.connection import add_connection_arguments, tls_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_connection_arguments(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between views (1.0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per change instead of the view")


def run(arguments: argparse.Namespace) -> int:
    from services.monitor.top import watch

    asyncio.run(watch(arguments.learner, tls_of(arguments), arguments.interval, as_json=arguments.json))
    return 0

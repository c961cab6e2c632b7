"""`heterorl status`: a learner's state, once."""

import argparse
import asyncio

from services.commands.connection import add_connection_arguments, tls_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_connection_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the RunStatus message as JSON")


def run(arguments: argparse.Namespace) -> int:
    from services.monitor.client import MonitorClient
    from services.monitor.views import as_json, console, render

    tls = tls_of(arguments)

    async def show() -> None:
        async with MonitorClient(arguments.learner, tls) as client:
            status = await client.status()
        if arguments.json:
            print(as_json(status, indent=2))
        else:
            console().print(render(status))

    asyncio.run(show())
    return 0

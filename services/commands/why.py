"""`heterorl why`: what keeps a run slow or stuck, in sentences."""

import argparse
import asyncio
import json

from services.commands.connection import add_connection_arguments, tls_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_connection_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list of sentences")


def run(arguments: argparse.Namespace) -> int:
    from services.monitor.client import MonitorClient
    from services.monitor.health import is_serving
    from services.monitor.why import findings
    from services.runtime.terminal import visible

    tls = tls_of(arguments)

    async def ask() -> list[str]:
        async with MonitorClient(arguments.learner, tls) as client:
            status = await client.status()
        return findings(status, serving=await is_serving(arguments.learner, tls))

    sentences = asyncio.run(ask())
    print(json.dumps(sentences) if arguments.json else visible("\n".join(sentences)))
    return 0

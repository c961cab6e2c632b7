"""`heterorl health`: asks a service's gRPC health check, as a container's or a load balancer's probe does."""

import argparse
import asyncio
import json
from pathlib import Path

from services.runtime.errors import UsageError
from services.wire.tls import TlsFiles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", required=True, metavar="ADDRESS", help="HOST:PORT, or unix:///path of a socket")
    for name, what in (("ca", "the authority"), ("certificate", "our certificate"), ("key", "its private key")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"PEM file of {what}")
    parser.add_argument("--json", action="store_true", help='print {"address": …, "serving": …}')


def run(arguments: argparse.Namespace) -> int:
    from services.monitor.health import is_serving

    given = (arguments.ca, arguments.certificate, arguments.key)
    if any(given) and not all(given):
        raise UsageError("say --ca, --certificate and --key together, or none of them for a local service")
    tls = TlsFiles(ca=arguments.ca, certificate=arguments.certificate, key=arguments.key) if all(given) else None
    serving = asyncio.run(is_serving(arguments.address, tls))
    print(json.dumps({"address": arguments.address, "serving": serving}) if arguments.json else _words(serving))
    return 0 if serving else 69


def _words(serving: bool) -> str:
    return "serving" if serving else "not serving"

"""`heterorl pki`: certificates for mutual TLS."""

import argparse
from pathlib import Path

from services.runtime.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    dev = actions.add_parser("dev", help="make a CA and a certificate for every process, in one folder")
    dev.add_argument("directory", type=Path, metavar="DIR", help="folder of the certificates; made if absent")
    dev.add_argument(
        "--sampler",
        action="append",
        metavar="NAME",
        help="id of a sampler; repeat for more (default: those that DIR has; sampler-1 and sampler-2 in a new one)",
    )
    dev.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="HOST",
        help="name or address by which samplers reach the learner or relay, besides localhost; repeat for more",
    )


def run(arguments: argparse.Namespace) -> int:
    from services.wire.credentials import utc_now
    from services.wire.identity import require_id
    from services.wire.pki import Outcome, make_dev_pki, samplers_in

    directory: Path = arguments.directory
    samplers: list[str] = arguments.sampler or samplers_in(directory) or ["sampler-1", "sampler-2"]
    if len(set(samplers)) < len(samplers):
        raise UsageError("two samplers have the same name: ids must differ")
    made = make_dev_pki(directory, [require_id(name) for name in samplers], arguments.host, utc_now())
    for item in made:
        print(f"{item.outcome.value:<8} {directory / item.name}.pem  until {item.expires:%Y-%m-%d}")
    if all(item.outcome is Outcome.KEPT for item in made):
        print("everything was valid already: nothing was changed")
    print(f"keep {directory / 'ca-key.pem'} secret; give each host ca.pem and its own NAME.pem and NAME-key.pem")
    return 0

"""`heterorl relay`: serves a learner's weights to one site from a disk cache."""

import argparse
import os
from pathlib import Path

from services.commands.connection import add_tls_arguments, tls_overrides
from services.runtime.address import parse_listen, parse_target
from services.runtime.config import add_config_arguments, load
from services.runtime.errors import UsageError

_SHORT = {
    "upstream": "connect.upstream",
    "listen": "listen.address",
    "cache": "cache.dir",
    "max_bytes": "cache.max_bytes",
}
"""Options that stand for a key of the config file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--upstream", metavar="HOST:PORT", help="the learner; the same as --connect.upstream")
    parser.add_argument("--listen", metavar="HOST:PORT", help="where samplers ask; the same as --listen.address")
    add_tls_arguments(parser, "relay")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder of the cache; the same as --cache.dir")
    parser.add_argument("--max-bytes", metavar="N", help="bytes that it may use; the same as --cache.max_bytes")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ends with 0 after a drain; other exit codes as in docs/operations.md."""
    from services.relay.config import RelayConfig
    from services.runtime import log

    config = load(RelayConfig, arguments.config, overrides_of(arguments), os.environ).value
    log.configure(config.log)
    from services.relay.app import run_relay
    from services.runtime import lifecycle

    return lifecycle.run(lambda process: run_relay(config, process), "relay")


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """The `--section.key=value` words: those given, and those that the short options stand for.
    Raises UsageError for a short option that is no address."""
    _check_addresses(arguments)
    words: list[str] = list(arguments.overrides)
    for option, key in _SHORT.items():
        value: str | Path | None = getattr(arguments, option)
        if value is not None:
            words.append(f"--{key}={value}")
    return words + tls_overrides(arguments, "connect", "listen")


def _check_addresses(arguments: argparse.Namespace) -> None:
    for option, parse in (("upstream", parse_target), ("listen", parse_listen)):
        try:
            if getattr(arguments, option) is not None:
                parse(getattr(arguments, option))
        except UsageError as error:
            raise UsageError(f"--{option}: {error}") from None

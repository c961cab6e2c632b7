"""`heterorl sampler`: generates, scores and submits groups for a learner."""

import argparse
import os

from services.commands.connection import add_tls_arguments, tls_overrides
from services.runtime.config import add_config_arguments, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learner", metavar="HOST:PORT", help="the learner; the same as --connect.learner")
    add_tls_arguments(parser, "sampler-1")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ends with 0 after a drain; other exit codes as in docs/operations.md."""
    from services.runtime import log
    from services.runtime.address import parse_target
    from services.sampler.config import SamplerConfig

    overrides: list[str] = tls_overrides(arguments, "connect") + list(arguments.overrides)
    if arguments.insecure:  # no certificate says who we are
        overrides.insert(0, f"--connect.sampler_id={arguments.identity}")
    if arguments.learner is not None:
        parse_target(arguments.learner)
        overrides.append(f"--connect.learner={arguments.learner}")
    config = load(SamplerConfig, arguments.config, overrides, os.environ).value
    config.require_credentials()
    log.configure(config.log)
    if config.engine.threads:  # before torch is imported: its pools are made then
        os.environ.setdefault("OMP_NUM_THREADS", str(config.engine.threads))

    from services.runtime import lifecycle
    from services.sampler.app import run_sampler

    return lifecycle.run(lambda process: run_sampler(config, process), "sampler")

"""`heterorl sampler`: generates, scores and submits groups for a learner."""

import argparse
import os

from services.runtime.config import add_config_arguments, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learner", metavar="HOST:PORT", help="the learner; the same as --connect.learner")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ends with 0 after a drain; other exit codes as in docs/operations.md."""
    from services.runtime import log
    from services.runtime.address import parse_target
    from services.sampler.config import SamplerConfig

    overrides: list[str] = list(arguments.overrides)
    if arguments.learner is not None:
        parse_target(arguments.learner)
        overrides.append(f"--connect.learner={arguments.learner}")
    config = load(SamplerConfig, arguments.config, overrides, os.environ).value
    parse_target(config.connect.learner)
    log.configure(config.log)
    if config.engine.threads:  # before torch is imported: its pools are made then
        os.environ.setdefault("OMP_NUM_THREADS", str(config.engine.threads))

    from services.runtime import lifecycle
    from services.sampler.app import run_sampler

    return lifecycle.run(lambda process: run_sampler(config, process), "sampler")

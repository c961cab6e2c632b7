"""`heterorl learner -c run.toml`: trains the policy and serves samplers."""

import argparse
import os
from pathlib import Path
from typing import cast

from services.commands.connection import add_tls_arguments, tls_overrides
from services.runtime.config import add_config_arguments, load
from services.runtime.log import configure, get_logger

_ANSWERS_S = 30.0
"""Spent on reading reference answers at a start; --check reads all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_tls_arguments(parser, "learner")
    add_config_arguments(parser)
    parser.add_argument("--check", action="store_true", help="check configuration, certificates and inputs, then end")


def run(arguments: argparse.Namespace) -> int:
    from services.learner.config import LearnerConfig

    path = cast("Path | None", arguments.config)
    overrides = tls_overrides(arguments, "listen") + list(arguments.overrides)
    config = load(LearnerConfig, path, overrides, os.environ).value
    configure(config.log)
    from services.learner.preflight import preflight

    inputs = preflight(config)
    from services.commands.answers import check_answers
    from services.reward.spec import GraderSpec

    data = [(config.data.train, inputs.train.prompts)]
    if config.data.eval is not None:
        data.append((config.data.eval, inputs.eval_prompts))
    graders = [GraderSpec(name=one.name, weight=one.weight, options=one.options) for one in config.reward]
    check_answers(data, graders, None if arguments.check else _ANSWERS_S)
    if arguments.check:
        _check_model(config.policy.path, config.data.system_prompt)
        print(f"run {config.run.id}: {len(inputs.train.prompts)} training prompts, configuration and inputs are good")
        return 0
    # Only now: the imports take seconds, and everything that a person gets wrong has been said by here.
    from services.learner.app import run_learner
    from services.runtime.lifecycle import Process
    from services.runtime.lifecycle import run as run_process

    async def main(process: Process) -> None:
        await run_learner(process, config, inputs)

    return run_process(main, "learner")


def _check_model(directory: Path, system_prompt: str) -> None:
    """What needs transformers, and no memory for weights. Raises ConfigError."""
    try:
        from services.learner.pretrained import check_tokenizer, load_config, quiet
    except ModuleNotFoundError as error:  # a configuration may be written, and checked, on a machine without torch
        get_logger("learner.check").warning("model_not_checked", missing=error.name)
        return
    quiet()
    load_config(directory)
    check_tokenizer(directory, system_prompt)

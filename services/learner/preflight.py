"""Everything of a start that can be checked before torch is imported: certificates, address, data sets, model files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from services.learner.config import LearnerConfig
from services.learner.dataset import Dataset
from services.learner.export_folder import check_export_folder
from services.learner.model_files import read_model_files
from services.runtime.address import Address, parse_listen, require_loopback
from services.runtime.errors import ConfigError, StorageError
from services.runtime.log import get_logger
from services.wire.channel import MESSAGE_BYTES
from services.wire.credentials import server_credentials
from services.wire.types import Prompt

_TOKEN_BYTES = 7
"""Of a completion's token in a message: 3 for its id, 4 for its log-prob."""

_log = get_logger("learner.preflight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the checks read. `credentials` is None without TLS."""

    address: Address
    credentials: grpc.ServerCredentials | None
    train: Dataset
    eval_prompts: tuple[Prompt, ...]


def preflight(config: LearnerConfig) -> Inputs:
    """Checks the whole configuration against this machine. Blocks, a second at most.

    Raises UsageError (address), RefusedError (no TLS beyond loopback, certificates), InputMissingError, BadInputError
    (data sets, model directory), ConfigError (settings that contradict each other), StorageError (folders to write to).
    """
    address = parse_listen(config.listen.address)
    credentials = None
    if config.listen.insecure:
        require_loopback(address)
    elif config.tls is None:
        raise ConfigError("set [tls] (see `heterorl pki dev`), or listen.insecure = true on a loopback address")
    else:
        credentials, _ = server_credentials(config.tls)
    keys = (config.data.prompt_key, config.data.answer_key)
    train = Dataset.load(config.data.train, *keys)
    held_out = () if config.data.eval is None else Dataset.load(config.data.eval, *keys).prompts
    read_model_files(config.policy.path)
    check_export_folder(config.run.policy_dir)
    _check_writable("run.state_dir", config.run.state_dir)
    _check_writable("run.export_dir", config.run.policy_dir.parent)
    _warn_of_long_groups(config)
    _warn_of_overlap(train.prompts, held_out[: config.eval.prompts])
    if config.eval.every_steps and config.data.eval is None:
        _log.warning("eval.every_steps is set, and data.eval names no held-out prompts: there will be no evaluation")
    return Inputs(
        address=address,
        credentials=credentials,
        train=train,
        eval_prompts=held_out[: config.eval.prompts],
    )


def _check_writable(key: str, folder: Path) -> None:
    """Raises StorageError where `folder` cannot be made or written to: a run's end is too late to hear of it."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise StorageError(f"{key} cannot be used: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"{key} cannot be used: this user may not write to {there}")


def _warn_of_long_groups(config: LearnerConfig) -> None:
    """A group travels as one message. Samplers give up those that do not fit, which are the longest: a bias."""
    sampling = config.sampling
    fits = MESSAGE_BYTES // (_TOKEN_BYTES * sampling.group_size)
    if sampling.max_completion_tokens > fits:
        _log.warning(
            f"a group of {sampling.group_size} completions fits a message up to {fits} tokens each on average, and "
            f"sampling.max_completion_tokens is {sampling.max_completion_tokens}: samplers give up longer groups"
        )


def _warn_of_overlap(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Accuracy is read as what the policy does with prompts that it was not trained on."""
    trained = {prompt.text.strip() for prompt in train}
    if both := sum(prompt.text.strip() in trained for prompt in held_out):
        _log.warning(
            f"{both} of the {len(held_out)} prompts of data.eval are in data.train too: they are not held out, and "
            "accuracy says less"
        )

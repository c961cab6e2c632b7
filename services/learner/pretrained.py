"""A Hugging Face folder into memory: tokenizer, config, weights. What cannot be a policy is refused in one sentence."""

from pathlib import Path
from typing import cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from services.runtime.errors import ConfigError, InvalidWeightsError
from services.runtime.log import get_logger
from services.wire.conversation import prompt_text
from services.wire.model_layout import attention_kinds

_PROBE = "What is 1 + 1?"

_log = get_logger("learner.policy")


def quiet() -> None:
    """transformers' progress bars and reports are not the log's lines of JSON; what they say is said here."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def load_config(directory: Path) -> PretrainedConfig:
    """Raises ConfigError for one that cannot be read, and for any but a causal language model's."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config's own checks raise classes of huggingface_hub's
        raise ConfigError(f"config.json in {directory} does not load: {_words(error)}") from error
    if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"the model in {directory} ({config.model_type}) is no causal language model of transformers: "
            "set policy.path to one"
        )
    return config


def check_tokenizer(directory: Path, system_prompt: str) -> int:
    """Its highest token id. Raises ConfigError for one that cannot be read, and for a chat template that fails, or
    leaves out what is asked: every sampler would find out, one after another."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise plain Exception for a file they cannot read
        raise ConfigError(f"the tokenizer in {directory} does not load: {_words(error)}") from error
    if _PROBE not in prompt_text(tokenizer, _PROBE, system_prompt):
        raise ConfigError(f"the chat template in {directory} leaves out the text of a message: correct it")
    return max(cast("dict[str, int]", tokenizer.get_vocab()).values(), default=-1)


def load_model(directory: Path, config: PretrainedConfig) -> PreTrainedModel:
    """float32, on the CPU. Raises InvalidWeightsError for missing weights, which would train noise, and for those of
    another shape; warns of those that the model does not use."""
    last: Exception | None = None
    for attention in attention_kinds(config):
        try:
            loaded: object = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
                output_loading_info=True,
            )
        except (ValueError, ImportError) as error:  # "does not support sdpa" is a ValueError
            last = error
            continue
        except Exception as error:  # safetensors raises its own class for a damaged file
            raise InvalidWeightsError(f"the weights in {directory} do not load: {_words(error)}") from error
        model, info = cast("tuple[PreTrainedModel, dict[str, set[object]]]", loaded)
        _check_loaded(directory, info)
        return model
    raise ConfigError(f"transformers cannot build a causal language model from {directory}: {_words(last)}") from last


def _check_loaded(directory: Path, info: dict[str, set[object]]) -> None:
    if mismatched := sorted(cast("set[tuple[str, torch.Size, torch.Size]]", info["mismatched_keys"])):
        name, stored, wanted = mismatched[0]
        raise InvalidWeightsError(
            f"the weights in {directory} do not fit its config.json: {name} is {list(stored)}, and the model has "
            f"{list(wanted)} ({len(mismatched)} such tensors)"
        )
    if missing := sorted(map(str, info["missing_keys"])):
        raise InvalidWeightsError(f"the weights in {directory} lack {missing[0]} ({len(missing)} such tensors)")
    if unused := sorted(map(str, info["unexpected_keys"])):
        _log.warning("weights_not_used", path=directory, tensors=len(unused), first=unused[0])


def _words(error: Exception | None) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]

"""A Hugging Face model directory as an engine needs it: tokenizer, empty model, end-of-sequence ids."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from services.runtime.errors import ConfigError, InputMissingError
from services.wire.model_layout import attention_kinds

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 only where the device is quick with it."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Raises InputMissingError when the directory has no tokenizer."""
    if not (model_dir / "tokenizer.json").exists() and not (model_dir / "tokenizer_config.json").exists():
        raise InputMissingError(f"{model_dir} has no tokenizer: a policy needs tokenizer.json beside config.json")
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer in {model_dir} cannot be loaded: {_first_line(error)}") from error


def build_model(model_dir: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture without its weights, in evaluation mode. Raises InputMissingError, ConfigError."""
    model = _from_config(model_dir, device, dtype)
    model.tie_weights()  # a part of the initialisation that was left out
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or _SUPPORTED_LAYERS)
    if layers - _SUPPORTED_LAYERS or getattr(model, "_is_stateful", False):
        found = ", ".join(sorted(layers - _SUPPORTED_LAYERS)) or "state instead of keys and values"
        raise ConfigError(f"{type(model).__name__} has layers of another kind ({found}): use engine.kind = vllm for it")
    return model.eval()


def model_without_memory(model_dir: Path) -> PreTrainedModel:
    """The architecture alone, on "meta": what names and shapes are asked of. Raises as `build_model` does."""
    # transformers sets torch's default type, which is every thread's: here, to what it is anyway.
    return _from_config(model_dir, torch.device("meta"), torch.float32)


def _from_config(model_dir: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    if not (model_dir / "config.json").exists():
        raise InputMissingError(f"{model_dir} has no config.json: it is not a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True)
        # Left to transformers where more than one is right: it takes the best that the model has.
        kinds = attention_kinds(config)
        attention = kinds[0] if len(kinds) == 1 else None
        with torch.device(device), no_init_weights():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"the model in {model_dir} cannot be built here: {_first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"the model in {model_dir} does not fit on {device}: {_first_line(error)}") from error


def end_token_ids(model_dir: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a sequence: of generation_config.json, config.json and the tokenizer."""
    ids: set[int] = set()
    path = model_dir / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    for value in (stated, config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        ids.update(id_ for id_ in (value if isinstance(value, list) else [value]) if isinstance(id_, int))
    return frozenset(ids)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]

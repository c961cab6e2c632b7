"""The files of a model directory that travel to samplers. Imports no torch: a preflight check is quick."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from services.runtime.errors import BadInputError, ConfigError, InputMissingError
from services.runtime.files import storage_errors

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    *_TOKENIZER_FILES,
)
_POINTER = b"version https://git-lfs.github.com/spec/"


def read_model_files(directory: Path) -> dict[str, bytes]:
    """Config, tokenizer and chat template, by name.

    Raises InputMissingError naming what the directory lacks or Git LFS has yet to fetch, ConfigError for a tokenizer
    without chat template, an adapter and a quantized checkpoint, BadInputError for a config that is not JSON.
    """
    if not directory.is_dir():
        raise InputMissingError(
            f"model directory {directory} is not there: set policy.path to a Hugging Face directory"
        )
    with storage_errors(f"read {directory}"):
        _check_no_pointers(directory)
        files = {name: (directory / name).read_bytes() for name in _FILES if (directory / name).is_file()}
    if (directory / "adapter_config.json").exists():
        raise ConfigError(
            f"{directory} holds an adapter (LoRA): merge it into its base model, and remove adapter_config.json"
        )
    if "config.json" not in files:
        raise InputMissingError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    _check_not_quantized(_object(files["config.json"], directory / "config.json"), directory)
    _object(files.get("generation_config.json", b"{}"), directory / "generation_config.json")
    if not any(directory.glob("*.safetensors")):
        hint = ": convert its .bin files, pickles are not read" if any(directory.glob("*.bin")) else ""
        raise InputMissingError(f"{directory} has no .safetensors weights{hint}")
    if not any(name in files for name in _TOKENIZER_FILES):
        raise InputMissingError(f"{directory} has no tokenizer (tokenizer.json): save one beside the model")
    if not _has_chat_template(files, directory):
        raise ConfigError(f"the tokenizer in {directory} has no chat template: add a chat_template.jinja")
    return files


def _check_no_pointers(directory: Path) -> None:
    """Of a clone without Git LFS: torch and transformers call such files damaged. Files that nobody reads, such as
    consolidated.safetensors, may stay pointers."""
    for path in sorted({*directory.glob("model*.safetensors*"), *(directory / name for name in _FILES)}):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise InputMissingError(
                        f"{path} is a pointer of Git LFS and not the file: run `git lfs pull` there"
                    )


def _check_not_quantized(config: Mapping[str, object], directory: Path) -> None:
    """Samplers and the export would take weights of full precision for quantized ones."""
    of_text = config.get("text_config")
    for part in (config, cast("Mapping[str, object]", of_text) if isinstance(of_text, dict) else {}):
        if part.get("quantization_config"):
            raise ConfigError(f"{directory} is a quantized checkpoint: set policy.path to the one that it was made of")


def _has_chat_template(files: Mapping[str, bytes], directory: Path) -> bool:
    if "chat_template.jinja" in files or "chat_template.json" in files:
        return True
    name = "tokenizer_config.json"
    return bool(_object(files.get(name, b"{}"), directory / name).get("chat_template"))


def _object(data: bytes, path: Path) -> Mapping[str, object]:
    try:
        value: object = json.loads(data)
    except ValueError as error:
        raise BadInputError(f"{path} is not JSON ({error}): was it cut short?") from None
    if not isinstance(value, dict):
        raise BadInputError(f"{path} is not a JSON object")
    return cast("Mapping[str, object]", value)

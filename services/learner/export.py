"""The final policy as a Hugging Face directory: bf16 safetensors, config, tokenizer, chat template, model card."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.learner.export_folder import CARD_NAME, MARK, holds_export, new_folder, remove_left_over, replace_export
from services.learner.policy import Policy
from services.learner.tensor_file import save_tensors
from services.runtime.files import storage_errors, sync_directory, sync_files
from services.wire.delta import Weights
from services.wire.model_layout import as_in_files
from services.wire.torch_bits import to_torch

SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What the model card says."""

    run_id: str
    base_model: str
    loss: str
    steps: int
    version: int
    root: str
    accuracy_start: float | None
    accuracy_end: float | None


def export_policy(directory: Path, policy: Policy, weights: Weights, provenance: Provenance) -> None:
    """Writes `directory` as a whole or not at all, in place of an earlier export; leaves one of the same root alone.
    Blocks. Raises StorageError, ConfigError where something else stands there.

    `weights` are the bits of the final version: what every sampler generated with. Their names are those of the
    family's published checkpoints.
    """
    with storage_errors(f"export the policy to {directory}"):
        remove_left_over(directory)
        if holds_export(directory, provenance.root):
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = new_folder(directory)
        try:
            for name, data in policy.files.items():
                (temporary / name).write_bytes(_exported_config(data) if name == "config.json" else data)
            _write_weights(temporary, as_in_files(policy.model, weights))
            (temporary / CARD_NAME).write_text(model_card(provenance), encoding="utf-8", errors="replace")
            temporary.chmod(0o755)
            sync_files(temporary)
            replace_export(directory, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(directory.parent)


def _exported_config(data: bytes) -> bytes:
    """config.json with the type that the weights are written in."""
    fields: dict[str, object] = json.loads(data)
    fields.pop("torch_dtype", None)
    fields["dtype"] = "bfloat16"
    return json.dumps(fields, indent=2).encode() + b"\n"


def _write_weights(directory: Path, weights: Weights) -> None:
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name in sorted(weights):
        if weights[name].nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= weights[name].nbytes
    if len(shards) == 1:
        save_tensors(to_torch(weights), directory / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(to_torch({name: weights[name] for name in names}), directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def model_card(provenance: Provenance) -> str:
    """README.md of the export."""
    facts: Mapping[str, object] = {
        "Run": provenance.run_id,
        "Trained from": provenance.base_model,
        "Loss": provenance.loss,
        "Optimizer steps": provenance.steps,
        "Policy version": provenance.version,
        "Root digest of the weights": f"`{provenance.root}`",
        "Held-out accuracy before": _percent(provenance.accuracy_start),
        "Held-out accuracy after": _percent(provenance.accuracy_end),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [reinforcement-learning, heterorl]\n"
        "---\n\n"
        f"# {provenance.run_id}, version {provenance.version}\n\n{MARK}\n\n| | |\n|---|---|\n{rows}\n"
    )


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"

"""The policy that is trained: a Hugging Face causal language model with float32 master weights, and its files.

load_policy(directory) ──► Policy ── wire_weights() ──► bf16 bits of every parameter, canonical names, ties once
                              └───── files ───────────► config, tokenizer, chat template: what samplers need
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from services.learner.config import PolicySection
from services.learner.model_files import read_model_files
from services.learner.pretrained import check_tokenizer, load_config, load_model, quiet
from services.runtime.errors import ConfigError, InvalidWeightsError
from services.wire.delta import BitTensor
from services.wire.delta.memory import Memory
from services.wire.torch_bits import to_bits
from services.wire.torch_device import torch_device

WIRE_DTYPE = "BF16"
"""safetensors name of the type that weights travel in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """`model` holds float32 masters; `files` are the model directory's own, by name, except the weights."""

    model: PreTrainedModel
    files: Mapping[str, bytes]
    device: torch.device
    vocab_size: int

    def parameters(self) -> dict[str, Tensor]:
        """Every persistent tensor under its canonical name, tied ones once (the first name); not copies."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in cast("dict[str, Tensor]", self.model.state_dict(keep_vars=True)).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor
        return found

    def wire_weights(self, memory: Memory | None = None) -> dict[str, BitTensor]:
        """The bf16 casts as bits: memory that nobody holds, so that the next step may go on while they are encoded."""
        return to_bits(self.parameters(), memory=memory)

    @torch.no_grad()
    def round_buffers(self) -> None:
        """To what travels: buffers are never trained, and samplers would route to other experts than the trainer for
        ever where one of them is a bias of the router (DeepSeek V3)."""
        stored = self.model.state_dict().keys()
        for name, buffer in self.model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.copy_(buffer.bfloat16())


def load_policy(settings: PolicySection, system_prompt: str = "") -> Policy:
    """Loads model and files. Blocks.

    Raises as `read_model_files` does, ConfigError (tokenizer or chat template does not work, with this system prompt;
    no causal language model; no such device), InvalidWeightsError (weights that do not fit the config, or are not
    finite).
    """
    quiet()
    files = read_model_files(settings.path)
    device = torch_device(settings.device, "policy.device")
    config = load_config(settings.path)
    highest_id = check_tokenizer(settings.path, system_prompt)
    model = load_model(settings.path, config)
    model.to(device)  # pyright: ignore[reportArgumentType] - transformers wraps torch's method with its own self
    model.config.use_cache = False
    if settings.gradient_checkpointing:
        _checkpoint_layers(model, settings.path)
    model.eval()  # no dropout: the ratio p/q compares like with like
    policy = Policy(
        model=model,
        files=files,
        device=device,
        vocab_size=int(cast(Tensor, model.get_input_embeddings().weight).shape[0]),
    )
    policy.round_buffers()
    if highest_id >= policy.vocab_size:
        raise ConfigError(
            f"the tokenizer in {settings.path} has token ids up to {highest_id}, and the model's embedding has"
            f" {policy.vocab_size} rows: take the tokenizer that the model was trained with"
        )
    for name, tensor in policy.parameters().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidWeightsError(f"{name} in {settings.path} holds NaN or infinity: take another checkpoint")
    return policy


def _checkpoint_layers(model: PreTrainedModel, directory: Path) -> None:
    """Layers keep their input alone, and are computed again in the backward pass. transformers' own switch acts in
    training mode only, which would turn dropout on."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"the model in {directory} has no layers to checkpoint: set policy.gradient_checkpointing to false"
        )
    for layer in layers:
        # Of what copy.deepcopy can copy: recomputing log-probs takes a copy of the model.
        again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = cast("Callable[..., Tensor]", again)

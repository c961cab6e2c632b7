"""What learner and samplers must do alike with models of transformers. Imported by these two only, as torch_bits is."""

from typing import cast

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from services.wire.delta import Weights
from services.wire.torch_bits import to_bits, to_torch


def attention_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """Implementations of attention that compute what the model means, the best first.

    Capped scores (Gemma 2) are eager's only: transformers' sdpa leaves the cap out, and says nothing.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return ("eager",) if capped else ("sdpa", "eager")


def as_in_files(model: PreTrainedModel, weights: Weights) -> Weights:
    """The same values under the names and in the shapes of the family's published checkpoints, which other programs
    know. transformers changes some as it loads them: experts are stacked, modules have other names.

    `weights` may be a part of the model, of whole blocks. `model` may be without memory (on "meta").
    """
    before = to_torch(weights)
    after = cast("dict[str, torch.Tensor]", revert_weight_conversion(model, dict(before)))
    names = {id(tensor): name for name, tensor in before.items()}
    changed = to_bits({name: tensor for name, tensor in after.items() if id(tensor) not in names}, dtype=None)
    return {name: changed.get(name) or weights[names[id(tensor)]] for name, tensor in after.items()}

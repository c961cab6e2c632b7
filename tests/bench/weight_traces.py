"""Weights as training leaves them: bf16 snapshots of a Qwen3-shaped model under AdamW on fp32 masters.

The loss is a policy gradient on random tokens with random advantages: gradients with the noise of reinforcement learning,
in which most weights move less than a bf16 rounding step. The first steps, in which Adam's averages are still cold and
every weight moves by the learning rate, are not recorded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.wire.delta import BitTensor
from services.wire.torch_bits import to_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceConfig:
    """`steps` recorded optimizer steps after `warm_up_steps`; a batch is rows × tokens."""

    lr: float
    steps: int = 64
    warm_up_steps: int = 10
    rows: int = 4
    tokens: int = 32
    seed: int = 0


def model_config() -> Qwen3Config:
    """83.9M parameters in the shapes of Qwen3: grouped-query attention, q and k norms, gated MLP, tied embeddings."""
    return Qwen3Config(
        vocab_size=8192,
        hidden_size=640,
        intermediate_size=1920,
        num_hidden_layers=16,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )


def trace(config: TraceConfig) -> Iterator[tuple[int, dict[str, BitTensor]]]:
    """(step, bf16 weights) for step 0 to `config.steps`."""
    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(model_config()).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed + 1)
    for step in range(-config.warm_up_steps, config.steps + 1):
        if step >= 0:
            yield step, to_bits(model.state_dict())
        tokens_BT = torch.randint(0, 8192, (config.rows, config.tokens), generator=generator)
        advantage_B = torch.randn(config.rows, generator=generator)
        logits_BTV = model(input_ids=tokens_BT).logits[:, :-1]
        picked_BT = torch.log_softmax(logits_BTV, -1).gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)
        loss = -(advantage_B[:, None] * picked_BT).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

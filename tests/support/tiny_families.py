"""Random models of other families than the one that ships, small enough to be made in a moment."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_DECODER: Mapping[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: Mapping[str, Mapping[str, object]] = {
    # Fused projections; a head that is not tied.
    "phi3": _DECODER,
    # Experts that files hold one by one, and transformers stacks.
    "mixtral": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    # Caps low enough to matter, on attention scores and on logits; a window.
    "gemma2": {
        **_DECODER,
        "head_dim": 32,
        "query_pre_attn_scalar": 1,
        "sliding_window": 8,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 5.0,
    },
    # Transposed matrices, learnt positions, dropout that nobody wants here; tied.
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64},
    # A head of another name in files.
    "gpt_neox": {**_DECODER, "rotary_pct": 0.5},
    # Keys and values of different widths; a router with a float32 buffer that decides.
    "deepseek_v3": {
        **_DECODER,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
}


def save_family(directory: Path, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """bf16 weights, router buffers in float32, config and tokenizer."""
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **special, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = 100 + torch.rand(buffer.shape)  # bf16 has steps of one half there
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

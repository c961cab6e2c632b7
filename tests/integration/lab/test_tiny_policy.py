"""Policies made here load as any Hugging Face directory does."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from services.lab.tiny_policy import (
    EOS_TOKEN,
    SUM_CHARACTERS,
    PolicyShape,
    byte_level_tokenizer,
    character_tokenizer,
    random_policy,
    save_policy,
    tiny_model,
)
from services.runtime.errors import ConfigError

_SMALL = PolicyShape(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_size=48)
_TEXT = ["Natalia sold clips to 48 of her friends.", "Wie viele Äpfel hat sie? \u4e94 + 3 = 8\n"] * 20


def test_a_saved_policy_loads_with_the_auto_classes_as_its_weights_in_bf16(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    model = tiny_model(tokenizer, _SMALL, seed=1)
    save_policy(tmp_path, model, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen3ForCausalLM)
    assert loaded.dtype is torch.bfloat16
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    stored = loaded.state_dict()
    for name, values in model.state_dict().items():
        assert values.dtype is torch.float32  # saving leaves the model as it was
        assert torch.equal(stored[name], values.bfloat16())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 tied embeddings are stored once


def test_a_user_message_is_rendered_as_the_bare_prompt(tmp_path: Path) -> None:
    save_policy(tmp_path, tiny_model(character_tokenizer(), _SMALL, seed=1), character_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    user = {"role": "user", "content": "27+58="}
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer.encode("27+58=")
    assert len(ids) == 6
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": "85"}], tokenize=False)
    assert whole == "27+58=85" + EOS_TOKEN


def test_the_character_tokenizer_gives_every_character_back_and_knows_its_special_tokens() -> None:
    tokenizer = character_tokenizer()
    ids = tokenizer.encode(SUM_CHARACTERS)
    assert len(set(ids)) == len(SUM_CHARACTERS)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == SUM_CHARACTERS
    assert tokenizer.encode("é\n") == [tokenizer.unk_token_id] * 2
    assert tokenizer.encode("1" + EOS_TOKEN)[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (tiny_model(character_tokenizer(), _SMALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])


def test_a_random_policy_covers_any_text_with_its_bytes(tmp_path: Path) -> None:
    random_policy(tmp_path, _TEXT, 300, shape=_SMALL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 300
    for text in (*_TEXT[:2], "never seen: \u00df\U0001f600"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == 300
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|user|>\nHow many?<eos>\n<|assistant|>\n"


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 259"):
        byte_level_tokenizer(_TEXT, 258)

"""Policies small enough for a laptop: Qwen3 architecture, Hugging Face layout, made here.

tiny_model     untrained Qwen3 of about 240,000 parameters over the characters of sums
save_policy    model (bf16) + tokenizer -> a directory that AutoModelForCausalLM and AutoTokenizer load
random_policy  the same for free text: random weights and a byte-level BPE tokenizer trained on that text
"""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from services.runtime.errors import ConfigError

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
UNKNOWN_TOKEN = "<unk>"
# They are the first tokens of every vocabulary made here, so a token's place here is its id.
_SPECIAL_TOKENS = (PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN)
SUM_CHARACTERS = "0123456789+-*= "
# A user message is the bare prompt, an assistant message ends with eos; the context holds nothing else.
BARE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
ROLES_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyShape:
    """Sizes of a Qwen3 policy; the defaults are the shipped one's."""

    hidden_size: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp_size: int = 288
    context_tokens: int = 64


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of a sum, plus pad, eos and unk."""
    words = [*_SPECIAL_TOKENS, *SUM_CHARACTERS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast_tokenizer(tokenizer, BARE_CHAT_TEMPLATE)


def byte_level_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most `vocab_size` tokens (at least 259), trained on `texts`."""
    if vocab_size < 259:
        raise ConfigError(f"vocab_size must be at least 259 (256 bytes and 3 special tokens), not {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast_tokenizer(tokenizer, ROLES_CHAT_TEMPLATE)


def _fast_tokenizer(tokenizer: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(tokenizer: PreTrainedTokenizerFast, shape: PolicyShape, *, seed: int) -> Qwen3ForCausalLM:
    """An untrained float32 Qwen3 with tied embeddings for this tokenizer; the same seed, the same weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_SPECIAL_TOKENS.index(EOS_TOKEN),
        pad_token_id=_SPECIAL_TOKENS.index(PAD_TOKEN),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def save_policy(directory: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the model as bf16 safetensors with config and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    # A copy: the cast also rounds the rotary frequencies, which are not stored, and so would change the original.
    copy.deepcopy(model).bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # transformers 5 writes a class name that releases before it do not know; both know this one.
    settings = directory / "tokenizer_config.json"
    written = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(written, indent=2) + "\n")


def random_policy(
    directory: Path,
    tokenizer_text: Iterable[str],
    vocab_size: int,
    *,
    shape: PolicyShape | None = None,
    seed: int = 0,
) -> None:
    """A randomly initialised policy in `directory`, its byte-level BPE tokenizer trained on `tokenizer_text`.

    For end-to-end runs on real text where answers do not matter. The context is 1,024 tokens unless `shape` says
    otherwise. Raises ConfigError for a vocabulary below 259 tokens.
    """
    tokenizer = byte_level_tokenizer(tokenizer_text, vocab_size)
    save_policy(directory, tiny_model(tokenizer, shape or PolicyShape(context_tokens=1024), seed=seed), tokenizer)

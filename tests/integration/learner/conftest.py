"""A random policy, made once."""

from pathlib import Path

import pytest

from services.lab.tiny_policy import PolicyShape, character_tokenizer, save_policy, tiny_model

SMALL = PolicyShape(hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_size=48, context_tokens=64)


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 directory over the characters of sums."""
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = character_tokenizer()
    save_policy(directory, tiny_model(tokenizer, SMALL, seed=1), tokenizer)
    return directory

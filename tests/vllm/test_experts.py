"""Experts: files hold them one by one under names of their own, transformers stacks them, vLLM packs them on CPUs."""

import json
from pathlib import Path

import pytest

from services.lab.tiny_policy import character_tokenizer
from services.learner.config import PolicySection
from services.learner.policy import load_policy
from services.runtime.errors import ConfigError
from tests.support.engine_conformance import TinyPolicy, other_weights
from tests.support.tiny_families import save_family
from tests.vllm.conftest import Engines, eager
from tests.vllm.test_swap import changed, expect_exact


async def test_experts_are_loaded_exactly_and_again(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The second load touches one block alone: the experts of the other one stay as they were packed."""
    directory = tmp_path_factory.mktemp("mixtral")
    save_family(directory, "mixtral", character_tokenizer())
    weights = load_policy(PolicySection(path=directory, device="cpu")).wire_weights()
    policy = TinyPolicy(directory=directory, weights=weights, other_weights=other_weights(weights))
    engine = await engines.start(policy, policy.weights, 3, eager())
    await expect_exact(engine, policy, policy.weights)
    for wanted in (policy.other_weights, changed(policy.other_weights, "layers.1.mlp.experts"), policy.weights):
        await engine.load(wanted, 4, "0" * 64)
        await expect_exact(engine, policy, wanted)


async def test_a_model_that_would_keep_old_weights_is_refused(
    engines: Engines, policy: TinyPolicy, tmp_path: Path
) -> None:
    for file in policy.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt_oss"}))
    other = TinyPolicy(directory=tmp_path, weights=policy.weights, other_weights=policy.weights)
    with pytest.raises(ConfigError, match="gpt_oss"):
        await engines.start(other, policy.weights, 0, eager())

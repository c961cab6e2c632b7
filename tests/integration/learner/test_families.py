"""Policies of other families: trainer, engine and exported model are one distribution, and files keep their names."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.lab.tiny_policy import character_tokenizer
from services.learner.batches import MicroBatch
from services.learner.config import PolicySection
from services.learner.export import Provenance, export_policy
from services.learner.forward import Forward
from services.learner.policy import Policy, load_policy
from services.sampler.engine import Drawn
from services.sampler.engine_transformers import TransformersEngine
from services.wire.delta import root_of
from services.wire.torch_bits import to_bits
from tests.support.engine_conformance import PROMPT, asking, logprobs_of, reference_logits
from tests.support.tiny_families import FAMILIES, save_family

LONGER = tuple(4 + index % 9 for index in range(20))


@pytest.fixture(scope="module", params=FAMILIES)
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(str(request.param))
    save_family(directory, request.param, character_tokenizer())
    return directory


def trainer_logprobs(policy: Policy, prompt: tuple[int, ...], drawn: Drawn) -> torch.Tensor:
    ids_bl = torch.tensor([[*prompt, *drawn.token_ids]])
    micro = MicroBatch(index_b=torch.arange(1), token_ids_bl=ids_bl, attention_bl=torch.ones_like(ids_bl))
    mask_bt = torch.arange(ids_bl.shape[1] - 1)[None] >= len(prompt) - 1
    with torch.no_grad():
        return Forward(policy, 1.0, autocast=False)(micro, mask_bt).logprobs_BT[0, len(prompt) - 1 :]


def names_in(directory: Path) -> set[str]:
    with safe_open(str(directory / "model.safetensors"), framework="pt") as file:
        return set(file.keys())


async def test_trainer_engine_and_exported_model_agree(family_dir: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicySection(path=family_dir, device="cpu"))
    engine = TransformersEngine(device="cpu", dtype="float32", max_batch_rows=32, threads=1)
    weights = policy.wire_weights()
    await engine.start(family_dir, weights, 0, root_of(weights))
    try:
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.copy_((parameter * 1.25).bfloat16())
        weights = policy.wire_weights()
        await engine.load(weights, 1, root_of(weights))
        answers = [(prompt, await engine.generate(asking(prompt))) for prompt in (PROMPT, LONGER)]
    finally:
        await engine.close()
    provenance = Provenance(
        run_id="r", base_model="b", loss="gepo", steps=1, version=1, root="0", accuracy_start=None, accuracy_end=None
    )
    export_policy(tmp_path / "export", policy, weights, provenance)
    assert names_in(tmp_path / "export") == names_in(family_dir)
    exported: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for prompt, generated in answers:
        for drawn in generated.completions:
            theirs = torch.tensor(drawn.logprobs)
            assert theirs == pytest.approx(trainer_logprobs(policy, prompt, drawn), abs=1e-5)
            logits = reference_logits(exported, prompt, drawn)
            assert theirs == pytest.approx(logprobs_of(logits, drawn, 1.0), abs=1e-5)


def test_exported_values_are_the_bits_that_travelled(family_dir: Path, tmp_path: Path) -> None:
    policy = load_policy(PolicySection(path=family_dir, device="cpu"))
    weights = policy.wire_weights()
    provenance = Provenance(
        run_id="r",
        base_model="b\udcff",  # of a folder whose name is no UTF-8
        loss="gepo",
        steps=0,
        version=0,
        root="0",
        accuracy_start=None,
        accuracy_end=None,
    )
    export_policy(tmp_path / "export", policy, weights, provenance)
    again = load_policy(PolicySection(path=tmp_path / "export", device="cpu"))
    assert root_of(to_bits(again.parameters())) == root_of(weights)


def test_a_cap_is_seen_before_the_model_has_learnt_anything(tmp_path: Path) -> None:
    """Untrained logits are so small that a cap of 5 hardly changes them."""
    save_family(tmp_path, "gemma2", character_tokenizer())
    policy = load_policy(PolicySection(path=tmp_path, device="cpu"))
    with torch.no_grad():
        policy.parameters()["model.embed_tokens.weight"].mul_(1e-3)
    assert not Forward(policy, 1.0, autocast=False).in_chunks

"""New weights in a running vLLM: exactly those of a fresh engine, whatever was fused or tied."""

import asyncio
from collections.abc import Mapping

import pytest
import torch

from services.runtime.errors import InvalidWeightsError
from services.sampler.engine_vllm import VllmEngine
from services.wire.delta import BitTensor, root_of
from services.wire.torch_bits import to_bits, to_torch
from tests.support.engine_conformance import TinyPolicy, asking, logprobs_of, reference_logits
from tests.vllm.conftest import Engines, eager, make_policy, same_as_fresh


def changed(weights: Mapping[str, BitTensor], *names: str) -> dict[str, BitTensor]:
    """The same weights with other values in the tensors whose names contain one of `names`."""
    return dict(
        to_bits(
            {
                name: tensor.float() * 1.5 if any(part in name for part in names) else tensor
                for name, tensor in to_torch(weights).items()
            }
        )
    )


async def expect_exact(engine: VllmEngine, policy: TinyPolicy, weights: Mapping[str, BitTensor]) -> None:
    """Against plain transformers: any tensor that was not taken, or taken wrongly, is off by far more."""
    model = policy.model(weights)
    for request in (asking(seed=7, completions=8), asking((4,) * 20, seed=8)):
        generated = await engine.generate(request)
        for drawn in generated.completions:
            expected = logprobs_of(reference_logits(model, request.prompt_token_ids, drawn), drawn, 1.0)
            assert torch.tensor(drawn.logprobs) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "names", [("q_proj",), ("up_proj",), ("embed_tokens",), ("model.norm",), ("layers.1.self_attn.v_proj", "k_norm")]
)
async def test_a_load_that_touches_a_part_of_a_fused_or_tied_group_is_exact(
    engine: VllmEngine, policy: TinyPolicy, names: tuple[str, ...]
) -> None:
    weights = changed(policy.weights, *names)
    await engine.load(weights, 4, root_of(weights))
    await expect_exact(engine, policy, weights)
    await engine.load(policy.weights, 5, root_of(policy.weights))
    await expect_exact(engine, policy, policy.weights)


async def test_untied_weights_are_loaded_exactly(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> None:
    policy = make_policy(tmp_path_factory.mktemp("untied"), tied=False)
    assert "lm_head.weight" in policy.weights
    last = changed(policy.weights, "embed_tokens")
    engine, fresh = await asyncio.gather(
        engines.start(policy, policy.weights, 3, eager()), engines.start(policy, last, 4, eager())
    )
    await expect_exact(engine, policy, policy.weights)
    for weights in (policy.other_weights, changed(policy.weights, "lm_head"), last):
        await engine.load(weights, 4, root_of(weights))
        await expect_exact(engine, policy, weights)
    await same_as_fresh(engine, fresh)


async def test_prefixes_of_the_old_version_are_not_used_by_the_new(engine: VllmEngine, policy: TinyPolicy) -> None:
    """A prompt longer than a cache block, before and after."""
    prompt = tuple(4 + index % 9 for index in range(50))
    for weights, version in ((policy.weights, 3), (policy.other_weights, 4)):
        await engine.load(weights, version, root_of(weights))
        model = policy.model(weights)
        for _ in range(2):  # the second one finds the prefix
            for drawn in (await engine.generate(asking(prompt, completions=3))).completions:
                expected = logprobs_of(reference_logits(model, prompt, drawn), drawn, 1.0)
                assert torch.tensor(drawn.logprobs) == pytest.approx(expected, abs=1e-4)


async def test_a_version_without_a_changed_bit_is_a_new_version(engine: VllmEngine, policy: TinyPolicy) -> None:
    await engine.load(policy.weights, 8, root_of(policy.weights))
    assert (await engine.generate(asking())).policy_version == 8


async def test_weights_that_vllm_would_take_silently_are_refused(engine: VllmEngine, policy: TinyPolicy) -> None:
    """Another shape, another type, NaN: vLLM checks none of them."""
    before, restarts = await engine.generate(asking()), engine.restarts
    name = "model.layers.0.self_attn.q_proj.weight"
    good = policy.other_weights[name]
    not_a_number = good.bits.copy()
    not_a_number[5] = 0x7FC0
    for wrong in (
        BitTensor(dtype=good.dtype, shape=good.shape[::-1], bits=good.bits),
        BitTensor(dtype="F16", shape=good.shape, bits=good.bits),
        BitTensor(dtype=good.dtype, shape=good.shape, bits=not_a_number),
    ):
        with pytest.raises(InvalidWeightsError, match="q_proj"):
            await engine.load({**policy.other_weights, name: wrong}, 4, "0" * 64)
    assert (await engine.generate(asking())).completions == before.completions
    assert engine.restarts == restarts


async def test_in_flight_swaps_note_which_version_wrote_which_tokens(in_flight: VllmEngine, policy: TinyPolicy) -> None:
    engine = in_flight
    await engine.load(policy.weights, 3, root_of(policy.weights))
    calls = [asyncio.create_task(engine.generate(asking(seed=seed, completions=8, tokens=50))) for seed in range(12)]
    await asyncio.sleep(0)
    done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    for version, weights in ((4, policy.other_weights), (5, policy.weights)):
        assert await engine.load(weights, version, root_of(weights)) < 5
    groups = await asyncio.gather(*calls)
    assert any(drawn.version_spans for group in groups for drawn in group.completions)
    for group in groups:
        assert group.policy_root == root_of(policy.other_weights if group.policy_version == 4 else policy.weights)
        for drawn in group.completions:
            if drawn.version_spans:
                ends = [span.end for span in drawn.version_spans]
                versions = [span.policy_version for span in drawn.version_spans]
                assert ends == sorted(set(ends))
                assert ends[-1] == len(drawn.token_ids)
                assert versions == sorted(set(versions))
                assert group.policy_version <= versions[0]
    assert all(not drawn.version_spans for call in done for drawn in call.result().completions)
    after = await engine.generate(asking())
    assert after.policy_version == 5
    await expect_exact(engine, policy, policy.weights)
    await engine.load(policy.other_weights, 4, root_of(policy.other_weights))
    await expect_exact(engine, policy, policy.other_weights)

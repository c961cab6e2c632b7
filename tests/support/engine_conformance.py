"""What every implementation of services.sampler.engine.Engine must do. A test module subclasses `EngineConformance` and
gives the engine; the tests are inherited."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.runtime.errors import EngineError, InvalidWeightsError
from services.sampler.engine import Drawn, Engine, Generated, GenerateRequest
from services.wire.delta import BitTensor, root_of
from services.wire.torch_bits import to_bits, to_torch
from services.wire.types import FinishReason, SamplingSettings

PROMPT = (7, 6, 5, 13, 4, 4, 3, 16)
"""Ids of the character tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyPolicy:
    """A model directory and two sets of weights for it."""

    directory: Path
    weights: Mapping[str, BitTensor]
    other_weights: Mapping[str, BitTensor]

    def model(self, weights: Mapping[str, BitTensor]) -> PreTrainedModel:
        """A plain float32 transformers model with these weights."""
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        model.load_state_dict(to_torch(weights), strict=False)
        return model.eval()


def other_weights(weights: Mapping[str, BitTensor], scale: float = 1.3) -> Mapping[str, BitTensor]:
    """Weights of the same form that draw other tokens."""
    return to_bits({name: tensor.float() * scale for name, tensor in to_torch(weights).items()})


def asking(
    prompt: tuple[int, ...] = PROMPT,
    *,
    completions: int = 4,
    seed: int = 1,
    temperature: float = 1.0,
    tokens: int = 12,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: tuple[str, ...] = (),
) -> GenerateRequest:
    """A request with short names."""
    sampling = SamplingSettings(
        temperature=temperature, max_completion_tokens=tokens, top_p=top_p, top_k=top_k, stop=stop
    )
    return GenerateRequest(prompt_token_ids=prompt, completions=completions, sampling=sampling, seed=seed)


def reference_logits(model: PreTrainedModel, prompt: tuple[int, ...], drawn: Drawn) -> torch.Tensor:
    """Float32 logits (T, V) of each drawn token, from one pass without cache or padding."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *drawn.token_ids]])).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def logprobs_of(logits: torch.Tensor, drawn: Drawn, temperature: float) -> torch.Tensor:
    chosen = torch.tensor(drawn.token_ids)[:, None]
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, chosen)[:, 0]


StartEngine = Callable[[Mapping[str, BitTensor], int], Awaitable[Engine]]


class EngineConformance:
    """Fixtures a subclass gives: `policy` (TinyPolicy), `start` (StartEngine: a started float32 engine), `engine`
    (started with policy.weights as version 3)."""

    LOGPROB_TOLERANCE = 1e-5

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 1.8])
    async def test_logprobs_are_those_of_a_plain_forward_pass(
        self, engine: Engine, policy: TinyPolicy, temperature: float
    ) -> None:
        generated = await engine.generate(asking(temperature=temperature, completions=8))
        model = policy.model(policy.weights)
        for drawn in generated.completions:
            expected = logprobs_of(reference_logits(model, PROMPT, drawn), drawn, temperature)
            assert torch.tensor(drawn.logprobs) == pytest.approx(expected, abs=self.LOGPROB_TOLERANCE)
            assert all(value <= 0 for value in drawn.logprobs)

    async def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(self, engine: Engine) -> None:
        alone = await engine.generate(asking(seed=5))
        crowd = await asyncio.gather(
            engine.generate(asking((5, 3), seed=9, tokens=30)),
            engine.generate(asking(seed=5)),
            engine.generate(asking((4,) * 20, seed=2, temperature=0.5)),
        )
        assert [d.token_ids for d in crowd[1].completions] == [d.token_ids for d in alone.completions]

    async def test_seeds_and_completions_differ(self, engine: Engine) -> None:
        first, second = await engine.generate(asking(seed=1)), await engine.generate(asking(seed=2))
        assert first.completions != second.completions
        assert len({drawn.token_ids for drawn in first.completions}) > 1

    async def test_temperature_zero_takes_the_most_likely_token(self, engine: Engine, policy: TinyPolicy) -> None:
        generated = await engine.generate(asking(temperature=0.0))
        model = policy.model(policy.weights)
        assert len({drawn.token_ids for drawn in generated.completions}) == 1
        drawn = generated.completions[0]
        logits = reference_logits(model, PROMPT, drawn)
        assert tuple(logits.argmax(dim=-1).tolist()) == drawn.token_ids
        assert torch.tensor(drawn.logprobs) == pytest.approx(
            logprobs_of(logits, drawn, 1.0), abs=self.LOGPROB_TOLERANCE
        )

    @pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 3), (0.8, 5)])
    async def test_truncated_logprobs_are_those_of_the_truncated_distribution(
        self, engine: Engine, policy: TinyPolicy, top_p: float, top_k: int
    ) -> None:
        generated = await engine.generate(asking(completions=8, top_p=top_p, top_k=top_k))
        model = policy.model(policy.weights)
        for drawn in generated.completions:
            for logits, token, logprob in zip(
                reference_logits(model, PROMPT, drawn), drawn.token_ids, drawn.logprobs, strict=True
            ):
                kept = _kept_by_hand(logits, top_p, top_k)
                assert token in kept
                chosen = torch.log_softmax(logits[sorted(kept)], dim=0)[sorted(kept).index(token)]
                assert logprob == pytest.approx(float(chosen), abs=5 * self.LOGPROB_TOLERANCE)

    async def test_a_completion_ends_at_its_limit_or_with_an_end_token(self, engine: Engine) -> None:
        generated = await engine.generate(asking(completions=64, tokens=24, temperature=2.0))
        stopped = [d for d in generated.completions if d.finish_reason is FinishReason.STOP]
        overlong = [d for d in generated.completions if d.finish_reason is FinishReason.LENGTH]
        assert stopped
        assert overlong
        assert all(d.token_ids[-1] == 1 and 1 not in d.token_ids[:-1] for d in stopped)
        assert all(len(d.token_ids) == 24 and 1 not in d.token_ids for d in overlong)
        assert all(len(d.token_ids) == len(d.logprobs) for d in generated.completions)

    async def test_a_stop_text_ends_a_completion_and_stays_in_it(self, engine: Engine) -> None:
        free = await engine.generate(asking(completions=16, tokens=24, temperature=2.0))
        held = await engine.generate(asking(completions=16, tokens=24, temperature=2.0, stop=("7",)))
        seven = 3 + 7
        assert any(seven in d.token_ids[:-1] for d in free.completions)
        for before, after in zip(free.completions, held.completions, strict=True):
            end = before.token_ids.index(seven) + 1 if seven in before.token_ids else len(before.token_ids)
            assert after.token_ids == before.token_ids[:end]
            assert (after.finish_reason is FinishReason.STOP) == (after.token_ids[-1] in (seven, 1))

    async def test_a_load_changes_outputs_exactly_as_a_fresh_engine(
        self, engine: Engine, policy: TinyPolicy, start: StartEngine
    ) -> None:
        before = await engine.generate(asking())
        pause_s = await engine.load(policy.other_weights, 4, root_of(policy.other_weights))
        after = await engine.generate(asking())
        fresh = await (await start(policy.other_weights, 4)).generate(asking())
        assert after.completions == fresh.completions
        assert after.completions != before.completions
        assert (before.policy_version, after.policy_version) == (3, 4)
        assert after.policy_root == root_of(policy.other_weights)
        assert 0 <= pause_s < 5

    async def test_groups_in_flight_at_a_load_are_wholly_of_one_version(
        self, engine: Engine, policy: TinyPolicy
    ) -> None:
        old = policy.model(policy.weights)
        new = policy.model(policy.other_weights)
        calls = [asyncio.create_task(engine.generate(asking(seed=s, completions=8, tokens=40))) for s in range(12)]
        await asyncio.sleep(0.02)
        await engine.load(policy.other_weights, 4, root_of(policy.other_weights))
        calls.append(asyncio.create_task(engine.generate(asking(seed=99))))
        generated: list[Generated] = await asyncio.gather(*calls)
        assert generated[-1].policy_version == 4
        for group in generated:
            model = {3: old, 4: new}[group.policy_version]
            for drawn in group.completions:
                expected = logprobs_of(reference_logits(model, PROMPT, drawn), drawn, 1.0)
                assert torch.tensor(drawn.logprobs) == pytest.approx(expected, abs=self.LOGPROB_TOLERANCE)

    async def test_weights_that_do_not_fit_are_refused_and_the_old_version_serves_on(
        self, engine: Engine, policy: TinyPolicy
    ) -> None:
        before = await engine.generate(asking())
        name = next(iter(policy.other_weights))
        missing = {key: value for key, value in policy.other_weights.items() if key != name}
        for broken in (missing, {**policy.other_weights, "model.extra.weight": policy.other_weights[name]}):
            with pytest.raises(InvalidWeightsError):
                await engine.load(broken, 4, "0" * 64)
        assert (await engine.generate(asking())).completions == before.completions
        assert (await engine.generate(asking())).policy_version == 3

    async def test_more_rows_than_the_batch_holds_all_come_back(self, engine: Engine) -> None:
        groups = await asyncio.gather(*(engine.generate(asking(seed=s, completions=40)) for s in range(3)))
        assert [len(group.completions) for group in groups] == [40, 40, 40]

    async def test_a_cancelled_call_frees_its_rows(self, engine: Engine) -> None:
        call = asyncio.create_task(engine.generate(asking(completions=16, tokens=50)))
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len((await engine.generate(asking())).completions) == 4

    async def test_a_prompt_outside_of_the_vocabulary_is_an_engine_error(self, engine: Engine) -> None:
        with pytest.raises(EngineError, match="vocabulary"):
            await engine.generate(asking((100_000,)))

    async def test_closing_fails_what_is_in_flight(self, engine: Engine) -> None:
        call = asyncio.create_task(engine.generate(asking(completions=64, tokens=50)))
        await asyncio.sleep(0.01)
        await engine.close()
        with pytest.raises(EngineError):
            await call
        with pytest.raises(EngineError):
            await engine.generate(asking())


def _kept_by_hand(logits: torch.Tensor, top_p: float, top_k: int) -> set[int]:
    """Token ids that top-k and then top-p leave, one by one."""
    order = logits.argsort(descending=True).tolist()
    order = order[:top_k] if top_k else order
    probabilities = torch.softmax(logits[order], dim=0).tolist()
    kept: set[int] = set()
    total = 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if total >= top_p and kept:
            break
        kept.add(token)
        total += probability
    return kept

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from services.lab.tiny_policy import PolicyShape, character_tokenizer, save_policy, tiny_model
from services.runtime.errors import ConfigError, EngineError, InputMissingError
from services.sampler import running_batch
from services.sampler.engine import Engine
from services.sampler.engine_transformers import TransformersEngine
from services.sampler.running_batch import Row, RunningBatch
from services.wire.delta import BitTensor, root_of
from services.wire.torch_bits import to_bits
from tests.support.engine_conformance import EngineConformance, StartEngine, TinyPolicy, asking, other_weights


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> TinyPolicy:
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = character_tokenizer()
    shape = PolicyShape(hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_size=128, context_tokens=64)
    model = tiny_model(tokenizer, shape, seed=3)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)  # peaked enough for greedy and truncation to mean something
    save_policy(directory, model, tokenizer)
    weights = to_bits(model.state_dict())
    return TinyPolicy(directory=directory, weights=weights, other_weights=other_weights(weights))


@pytest.fixture
async def start(policy: TinyPolicy) -> AsyncIterator[StartEngine]:
    engines: list[Engine] = []

    async def begin(weights: Mapping[str, BitTensor], version: int) -> Engine:
        engine = TransformersEngine(device="cpu", dtype="float32", max_batch_rows=32, threads=1)
        engines.append(engine)
        await engine.start(policy.directory, weights, version, root_of(weights))
        return engine

    yield begin
    for engine in engines:
        await engine.close()


@pytest.fixture
async def engine(policy: TinyPolicy, start: StartEngine) -> Engine:
    return await start(policy.weights, 3)


class TestTransformersEngine(EngineConformance):
    """The conformance suite."""


async def test_a_failed_batch_is_an_engine_error_and_the_next_one_works(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = running_batch.draw
    calls = iter([RuntimeError("out of luck")])

    def failing(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if (error := next(calls, None)) is not None:
            raise error
        return draw(*arguments)

    monkeypatch.setattr(running_batch, "draw", failing)
    with pytest.raises(EngineError, match="out of luck"):
        await engine.generate(asking())
    assert engine.restarts == 1
    assert len((await engine.generate(asking())).completions) == 4


async def test_running_out_of_memory_while_cancelled_rows_are_cut_out_fails_the_batch_and_no_more(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_cancelled = RunningBatch.drop_cancelled
    calls = iter([torch.OutOfMemoryError("no room for the cut cache")])

    def failing(batch: RunningBatch) -> None:
        if (error := next(calls, None)) is not None:
            raise error
        drop_cancelled(batch)

    loop, both_admitted, rows_admitted = asyncio.get_running_loop(), asyncio.Event(), 0
    admit = RunningBatch.admit

    def counting(batch: RunningBatch, rows: Sequence[Row]) -> None:
        nonlocal rows_admitted
        admit(batch, rows)
        rows_admitted += len(rows)
        if rows_admitted == 32:
            loop.call_soon_threadsafe(both_admitted.set)

    monkeypatch.setattr(RunningBatch, "drop_cancelled", failing)
    monkeypatch.setattr(RunningBatch, "admit", counting)
    others = asyncio.create_task(engine.generate(asking(seed=2, completions=16, tokens=50)))
    cancelled = asyncio.create_task(engine.generate(asking(completions=16, tokens=50)))
    await asyncio.wait_for(both_admitted.wait(), 20)
    cancelled.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(EngineError, match="no room"):
            await others
        assert engine.restarts == 1
        assert len((await engine.generate(asking())).completions) == 4


async def test_the_context_bounds_a_completion(engine: Engine) -> None:
    generated = await engine.generate(asking((4,) * 60, tokens=50))
    assert max(len(drawn.token_ids) for drawn in generated.completions) <= 4


async def test_a_directory_without_tokenizer_or_config_is_named(tmp_path: Path, policy: TinyPolicy) -> None:
    engine = TransformersEngine(device="cpu")
    with pytest.raises(InputMissingError, match="tokenizer"):
        await engine.start(tmp_path, policy.weights, 0, "")
    (tmp_path / "tokenizer.json").write_bytes((policy.directory / "tokenizer.json").read_bytes())
    with pytest.raises(InputMissingError, match=r"config\.json"):
        await engine.start(tmp_path, policy.weights, 0, "")


def test_a_device_that_is_not_there_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"engine\.device"):
        TransformersEngine(device="cuda:99")

"""Tests of the vLLM engine, in the vLLM environment only (make test-vllm). A start takes 10 to 20 s, so engines are
shared: `engine` is given its weights anew for each test, which tests loading once more."""

import importlib.util
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from services.lab.tiny_policy import PolicyShape, character_tokenizer, save_policy, tiny_model
from services.runtime.errors import EngineError
from services.sampler.config import EngineSection, VllmSection
from services.sampler.engine_vllm import VllmEngine
from services.wire.delta import BitTensor, root_of
from services.wire.torch_bits import to_bits
from tests.support.engine_conformance import StartEngine, TinyPolicy, asking, other_weights

HERE = Path(__file__).parent
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


def make_policy(directory: Path, *, tied: bool) -> TinyPolicy:
    """Peaked enough for greedy and truncation to mean something."""
    tokenizer = character_tokenizer()
    shape = PolicyShape(hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=32, mlp_size=128, context_tokens=64)
    model = tiny_model(tokenizer, shape, seed=3)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    save_policy(directory, model, tokenizer)
    weights = to_bits(model.state_dict())
    return TinyPolicy(directory=directory, weights=weights, other_weights=other_weights(weights))


@dataclass(slots=True)
class Engines:
    """Starts engines, and closes them all at the end. `shared` is the one that most tests use."""

    folder: Path
    shared: VllmEngine | None = None
    started: list[VllmEngine] = field(default_factory=list[VllmEngine])

    async def start(
        self, policy: TinyPolicy, weights: Mapping[str, BitTensor], version: int, settings: VllmSection
    ) -> VllmEngine:
        section = EngineSection(kind="vllm", device="cpu", dtype="float32", max_batch_rows=32, threads=1, vllm=settings)
        engine = VllmEngine(section, self.folder)
        self.started.append(engine)
        await engine.start(policy.directory, weights, version, root_of(weights))
        return engine

    async def close(self) -> None:
        for engine in self.started:
            await engine.close()


def eager(**settings: object) -> VllmSection:
    """Without compiling: a quick start, the same weights path. Prompts of a batch do not fit into one step."""
    arguments = '{"enforce_eager": true, "max_num_batched_tokens": 64}'
    return VllmSection.model_validate({"arguments": arguments, "kv_cache_gb": 0.1, **settings})


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engines]:
    engines = Engines(tmp_path_factory.mktemp("state"))
    yield engines
    await engines.close()


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> TinyPolicy:
    return make_policy(tmp_path_factory.mktemp("policy"), tied=True)


@pytest.fixture
def start(policy: TinyPolicy, engines: Engines) -> StartEngine:
    async def begin(weights: Mapping[str, BitTensor], version: int) -> VllmEngine:
        return await engines.start(policy, weights, version, eager())

    return begin


@pytest_asyncio.fixture(loop_scope="session")
async def engine(policy: TinyPolicy, engines: Engines) -> VllmEngine:
    """The shared engine, or the next one if a test closed it, with policy.weights as version 3. Not compiled."""
    if engines.shared is not None:
        with suppress(EngineError):
            await engines.shared.load(policy.weights, 3, root_of(policy.weights))
            return engines.shared
    engines.shared = await engines.start(policy, policy.weights, 3, eager())
    return engines.shared


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def in_flight(policy: TinyPolicy, engines: Engines) -> VllmEngine:
    """Compiled, as engines are unless they are told otherwise; swaps between two tokens; quick to be called stuck."""
    settings = VllmSection(swap="in_flight", stuck_s=10, kv_cache_gb=0.1)
    return await engines.start(policy, policy.weights, 3, settings)


async def same_as_fresh(engine: VllmEngine, fresh: VllmEngine) -> None:
    """Tokens and log-probs, exactly."""
    for request in (asking(seed=11), asking((4,) * 20, seed=12, temperature=0.7), asking(temperature=0.0)):
        ours, theirs = await engine.generate(request), await fresh.generate(request)
        assert ours.completions == theirs.completions

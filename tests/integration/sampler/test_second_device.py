"""Drawing on a device beside the CPU: no tensor is on the wrong side, and the tokens are the same."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.lab.tiny_policy import PolicyShape, character_tokenizer, save_policy, tiny_model
from services.sampler.engine import Drawn
from services.sampler.model_files import build_model
from services.sampler.model_weights import copy_into_model, pair_tensors
from services.sampler.running_batch import Request, Row, RunningBatch
from services.wire.torch_bits import to_bits
from tests.support.engine_conformance import PROMPT, asking
from tests.support.second_device import SECOND, move, on_second_device

CPU = torch.device("cpu")
ASKED = (
    asking(completions=3, tokens=9),
    asking(PROMPT[:3], completions=2, seed=2, temperature=0.6, top_p=0.8),
    asking(PROMPT[2:], completions=2, seed=3, tokens=5, top_k=3, stop=("7",)),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = PolicyShape(hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_size=128, context_tokens=64)
    tokenizer = character_tokenizer()
    path = tmp_path_factory.mktemp("policy")
    save_policy(path, tiny_model(tokenizer, shape, seed=3), tokenizer)
    return path


def draw_all(directory: Path, device: torch.device) -> list[Sequence[Drawn | None]]:
    """New weights, then three requests, the last of which is admitted while the others are drawn."""
    with on_second_device(), torch.no_grad():
        model = build_model(directory, CPU, torch.float32)
        weights = to_bits(load_file(directory / "model.safetensors"), None)
        if device == SECOND:
            move(model)
        copy_into_model(pair_tensors(model, weights))
        batch = RunningBatch(model, (1,), 0, lambda ids: "".join(map(str, ids)))
        assert batch._device == device  # pyright: ignore[reportPrivateUsage]
        requests = [Request.of(asked, 64) for asked in ASKED]
        for admitted in (requests[:2], requests[2:]):
            rows = [Row(request=each, index=index) for each in admitted for index in range(each.asked.completions)]
            batch.admit(rows)
            batch.step()
            batch.step()
        while batch.active:
            batch.step()
    return [request.results for request in requests]


def test_what_is_drawn_there_is_what_the_cpu_draws(directory: Path) -> None:
    here, there = ([each for results in draw_all(directory, device) for each in results] for device in (CPU, SECOND))
    for ours, theirs in zip(here, there, strict=True):
        assert ours is not None
        assert theirs is not None
        assert all(map(math.isfinite, ours.logprobs))
        assert theirs == replace(ours, logprobs=pytest.approx(ours.logprobs, abs=1e-5))

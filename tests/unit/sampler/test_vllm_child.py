"""What of the vLLM engine needs no vLLM: which tensors travel, and what is passed to the child."""

import math
from pathlib import Path

import numpy as np
import pytest

from services.runtime.errors import ConfigError
from services.sampler.config import EngineSection, VllmSection
from services.sampler.engine_vllm import _drawn
from services.sampler.vllm_child.arguments import engine_arguments, environment
from services.sampler.vllm_child.staging import Staging, touched
from services.wire.delta import BitTensor, read_weights

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.10.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def tensors(*different: str) -> dict[str, BitTensor]:
    return {
        name: BitTensor(dtype="BF16", shape=(4,), bits=np.full(4, 7 + (name in different), dtype=np.uint16))
        for name in NAMES
    }


def test_a_log_prob_of_nan_is_not_taken_for_certainty() -> None:
    drawn = _drawn({"token_ids": [1, 2], "logprobs": [math.nan, 1e-7], "stopped": True, "spans": []})
    assert math.isnan(drawn.logprobs[0])
    assert drawn.logprobs[1] == 0.0


@pytest.mark.parametrize(
    ("different", "expected"),
    [
        ((), set()),
        ((NAMES[1],), {NAMES[1], NAMES[2], NAMES[3]}),
        ((NAMES[5],), {NAMES[5]}),
        ((NAMES[0],), {NAMES[0]}),
        ((NAMES[6], NAMES[4]), {NAMES[6], NAMES[4]}),
        (NAMES, set(NAMES)),
    ],
)
def test_whole_blocks_travel_when_any_bit_of_them_differs(different: tuple[str, ...], expected: set[str]) -> None:
    assert touched(tensors(), tensors(*different)).keys() == expected


def test_staging_gives_config_and_tokenizer_with_the_held_weights_only(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (source / name).write_text("{}")
    staging = Staging(tmp_path / "place", tmp_path / "unused", 64, dict)
    for _ in range(2):  # a restart does it again
        folder = staging.model_dir(source, tensors())
        assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
        assert read_weights(folder)[NAMES[0]].same_bits(tensors()[NAMES[0]])
        staging.drop_model_weights()
    staging.remove()
    assert not any((tmp_path / "place").iterdir())
    assert not (tmp_path / "unused").exists()


def test_folders_of_killed_processes_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    running = Staging(tmp_path, tmp_path, 64, dict)
    orphan = tmp_path / "heterorl-vllm-orphan"
    orphan.mkdir()
    (orphan / ".lock").touch()
    later = Staging(tmp_path, tmp_path, 64, dict)
    assert set(tmp_path.iterdir()) == {running.folder, later.folder}
    for staging in (running, later):
        staging.remove()


def test_settings_reach_vllm_by_its_own_names() -> None:
    vllm = VllmSection(
        max_model_len=4096,
        kv_cache_gb=2,
        tensor_parallel_size=2,
        quantization="fp8",
        swap="in_flight",
        arguments='{"max_num_batched_tokens": 4096}',
    )
    arguments = engine_arguments(EngineSection(max_batch_rows=64, vllm=vllm), "cuda")
    assert arguments["dtype"] == "bfloat16"
    assert arguments["max_num_seqs"] == 64
    assert arguments["kv_cache_memory_bytes"] == 2 << 30
    assert arguments["max_num_batched_tokens"] == 4096
    assert arguments["quantization"] == "fp8"
    assert arguments["async_scheduling"] is False
    assert engine_arguments(EngineSection(), "cpu")["dtype"] == "float32"


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "other"}', '{"logprobs_mode": "raw_logprobs"}'])
def test_arguments_that_vllm_may_not_be_given_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.vllm\.arguments"):
        engine_arguments(EngineSection(vllm=VllmSection(arguments=text)), "cpu")


def test_one_gpu_does_not_hold_a_model_spread_over_two() -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        engine_arguments(EngineSection(device="cuda:1", vllm=VllmSection(tensor_parallel_size=2)), "cuda")


def test_the_host_decides_on_its_environment_except_for_what_the_engine_needs(tmp_path: Path) -> None:
    ours = {"VLLM_CACHE_ROOT": "/var/cache", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    made = environment(EngineSection(threads=3, device="cuda:2"), tmp_path, ours)
    assert made["VLLM_CACHE_ROOT"] == "/var/cache"
    assert made["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert made["OMP_NUM_THREADS"] == "3"
    assert made["CUDA_VISIBLE_DEVICES"] == "2"


def test_a_device_is_one_of_those_that_the_host_lets_the_process_see(tmp_path: Path) -> None:
    ours = {"CUDA_VISIBLE_DEVICES": "4,5,GPU-8932f937"}
    made = [environment(EngineSection(device=name), tmp_path, ours) for name in ("auto", "cuda:1", "cuda:2")]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in made] == ["4,5,GPU-8932f937", "5", "GPU-8932f937"]

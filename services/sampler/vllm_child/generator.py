"""vLLM's engine with groups instead of requests, and the moments at which weights may change. Runs in the child.

    between_groups   a load waits until what runs has ended; what comes after the load waits for it
    in_flight        a load comes between two steps: sequences go on, and each token knows the version that wrote it

Prefixes are cached under the root of the weights that computed them (`cache_salt`), so that no new request meets old
keys and values, whether or not vLLM's own cache could be emptied.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
import vllm  # pyright: ignore[reportMissingImports]
from vllm import EngineArgs, SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.inputs.engine import tokens_input  # pyright: ignore[reportMissingImports]
from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

from services.sampler.model_files import end_token_ids, load_tokenizer
from services.sampler.vllm_child.messages import (
    Command,
    DrawnTokens,
    Generate,
    GeneratedGroup,
    Load,
    Ready,
    Report,
    Start,
)


class _Span(Protocol):
    version: str
    end: int


class _Logprobs(Protocol):
    start_indices: list[int]
    logprobs: list[float]


class _Completion(Protocol):
    token_ids: Sequence[int]
    logprobs: _Logprobs
    finish_reason: str
    weight_versions: list[_Span] | None


class _Output(Protocol):
    request_id: str
    finished: bool
    outputs: list[_Completion]


class _Engine(Protocol):
    """The part of vLLM's LLMEngine that is used here."""

    def add_request(self, request_id: str, prompt: object, params: object) -> str: ...

    def abort_request(self, request_ids: list[str]) -> None: ...

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> list[_Output]: ...

    def reset_prefix_cache(self) -> bool: ...

    def set_weight_version(self, weight_version: str) -> None: ...

    def collective_rpc(self, method: str, *, args: tuple[object, ...]) -> list[object]: ...


@dataclass(slots=True, kw_only=True)
class _Group:
    """A group in the engine; `drawn` by index, None while a completion is being written."""

    version: int
    started: float
    drawn: list[DrawnTokens | None]


class Generator:
    """One running engine. Not thread-safe."""

    def __init__(self, engine: _Engine, start: Start, ready: Ready, end_ids: frozenset[int]) -> None:
        self._engine = engine
        self._in_flight = start["in_flight"]
        self._version = start["version"]
        self._roots = {start["version"]: start["root"]}
        self._ready = ready
        self._end_ids = sorted(id_ for id_ in end_ids if id_ < ready["vocab_size"])  # vLLM refuses others
        self._groups: dict[int, _Group] = {}
        engine.set_weight_version(str(self._version))

    @classmethod
    def build(cls, start: Start) -> "Generator":
        """Loads the model. Raises whatever vLLM raises; ValueError for most settings that do not work."""
        engine = LLMEngine.from_engine_args(EngineArgs(model=start["model_dir"], **start["arguments"]))
        config = engine.model_config
        directory = Path(start["model_dir"])
        ready = Ready(
            kind="ready",
            vllm=str(vllm.__version__),
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            vocab_size=int(config.get_vocab_size()),
            context_tokens=int(config.max_model_len),
        )
        end_ids = end_token_ids(directory, config.hf_config, load_tokenizer(directory))
        generator = cls(cast("_Engine", engine), start, ready, end_ids)
        generator._warm_up()
        return generator

    def _warm_up(self) -> None:
        """The first batch imports and compiles, for seconds to minutes: here, where silence is not yet a hang."""
        asked = Generate(
            kind="generate", id=0, prompt=[0], seeds=[0, 1], max_tokens=2, temperature=1.0, top_p=0.5, top_k=2, stop=[]
        )
        self._add(asked)
        while self.busy:
            list(self._finished(self._engine.step()))
        self._engine.reset_prefix_cache()

    @property
    def busy(self) -> bool:
        """Whether there is something to step."""
        return self._engine.has_unfinished_requests()

    def ready(self) -> Ready:
        return self._ready

    def cancel(self, group_id: int) -> None:
        """Frees the group's sequences; unknown ids are answered already."""
        group = self._groups.pop(group_id, None)
        if group is not None:
            self._engine.abort_request([f"{group_id}.{index}" for index in range(len(group.drawn))])

    def advance(self, waiting: "deque[Command]") -> Iterator[Report]:
        """Takes what may be taken from `waiting`, in order, and makes one step."""
        while waiting:
            command = waiting[0]
            if command["kind"] == "load":
                if not self._may_load(command):
                    break
                yield self._load(command)
            elif command["kind"] == "generate":
                try:
                    self._add(command)
                except (ValueError, VLLMValidationError) as error:
                    self.cancel(command["id"])
                    yield {"kind": "failed", "id": command["id"], "message": " ".join(str(error).split())[:400]}
            waiting.popleft()
        if self.busy:
            yield from self._finished(self._engine.step())

    def _may_load(self, load: Load) -> bool:
        """Version spans must not fall: going back to an older version is done between groups whatever the policy."""
        return not self._groups or (self._in_flight and load["version"] > self._version)

    def _add(self, asked: Generate) -> None:
        """Raises ValueError or VLLMValidationError for what vLLM refuses."""
        prompt = asked["prompt"]
        group = _Group(version=self._version, started=time.monotonic(), drawn=[None] * len(asked["seeds"]))
        self._groups[asked["id"]] = group
        for index, seed in enumerate(asked["seeds"]):
            params = SamplingParams(
                temperature=asked["temperature"],
                top_p=asked["top_p"],
                top_k=asked["top_k"],
                stop=asked["stop"],
                stop_token_ids=self._end_ids,
                max_tokens=min(asked["max_tokens"], self._ready["context_tokens"] - len(prompt)),
                seed=seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=bool(asked["stop"]),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            entry = tokens_input(prompt, cache_salt=self._roots[self._version] or None)
            self._engine.add_request(f"{asked['id']}.{index}", entry, params)

    def _load(self, load: Load) -> Report:
        """Whatever goes wrong here may have left a mix of two versions: the caller must end the process."""
        started = time.monotonic()
        try:
            if load["path"]:
                self._engine.collective_rpc("heterorl_reload", args=(load["path"],))
            self._engine.reset_prefix_cache()
        except Exception as error:  # the child's end
            return {"kind": "load_failed", "message": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        self._version = load["version"]
        self._engine.set_weight_version(str(self._version))
        alive = {group.version for group in self._groups.values()}
        self._roots = {v: r for v, r in self._roots.items() if v >= min(alive, default=self._version)}
        self._roots[self._version] = load["root"]
        return {"kind": "loaded", "version": self._version, "pause_s": time.monotonic() - started}

    def _finished(self, outputs: list[_Output]) -> Iterator[GeneratedGroup]:
        for output in outputs:
            group_id, index = map(int, output.request_id.split("."))
            group = self._groups.get(group_id)
            if group is None or not output.finished:
                continue
            group.drawn[index] = _drawn(output.outputs[0])
            drawn = [completion for completion in group.drawn if completion is not None]
            if len(drawn) == len(group.drawn):
                del self._groups[group_id]
                yield self._answer(group_id, group, drawn)

    def _answer(self, group_id: int, group: _Group, drawn: list[DrawnTokens]) -> GeneratedGroup:
        """The group's version is the oldest that wrote a token of it."""
        versions = {version for completion in drawn for _, version in completion["spans"]}
        version = min(versions, default=group.version)
        if len(versions) < 2:
            for completion in drawn:
                completion["spans"] = []
        return {
            "kind": "generated",
            "id": group_id,
            "completions": drawn,
            "version": version,
            "root": self._roots[version],
            "seconds": time.monotonic() - group.started,
        }


def _drawn(completion: _Completion) -> DrawnTokens:
    logprobs = completion.logprobs
    return {
        "token_ids": list(completion.token_ids),
        "logprobs": [logprobs.logprobs[start] for start in logprobs.start_indices],
        "stopped": completion.finish_reason == "stop",
        "spans": [(span.end, int(span.version)) for span in completion.weight_versions or ()],
    }

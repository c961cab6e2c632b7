"""The transformers engine: any Hugging Face causal LM, on any device that torch knows.

    generate (many coroutines) ─► waiting ─► worker thread: admit → step → step … ─► futures
    load ────────────────────────► loads ──┘  nothing runs while weights are copied

Requests join the running batch as rows become free. A load closes the door: what runs ends under the old version,
what waits begins under the new one.
"""

import asyncio
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import TypeVar

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from services.runtime.errors import EngineError, HeteroRLError
from services.runtime.log import get_logger
from services.sampler.engine import Drawn, Generated, GenerateRequest
from services.sampler.model_files import build_model, end_token_ids, load_tokenizer, resolve_dtype
from services.sampler.model_weights import copy_into_model, pair_tensors
from services.sampler.running_batch import Request, Row, RunningBatch
from services.wire.delta import Weights
from services.wire.torch_device import torch_device
from services.wire.types import EngineInfo

_log = get_logger("sampler.engine")
# New rows interrupt the running ones for a prefill and a copy of the cache: wait until this share of rows is free.
_ADMIT_SHARE = 1 / 4
_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """One `generate` call."""

    request: Request
    answer: asyncio.Future[Generated]
    loop: asyncio.AbstractEventLoop
    admitted: int = 0
    started: float = 0.0

    def resolve(self, outcome: Generated | HeteroRLError) -> None:
        _settle(self.loop, self.answer, outcome)


@dataclass(slots=True, kw_only=True, eq=False)
class _Load:
    """One `load` call; `tensors` are pairs of the model's tensor and its new value."""

    tensors: list[tuple[torch.Tensor, torch.Tensor]]
    version: int
    root: str
    answer: asyncio.Future[float]
    loop: asyncio.AbstractEventLoop


@dataclass(slots=True)
class _Desk:
    """What coroutines hand to the worker, under `changed`."""

    changed: Condition = field(default_factory=Condition)
    waiting: deque[_Job] = field(default_factory=deque[_Job])
    loads: deque[_Load] = field(default_factory=deque[_Load])
    closing: bool = False


class TransformersEngine:
    """Implements `services.sampler.engine.Engine`.

    device: "auto", "cpu", "cuda", "cuda:N". dtype: "auto", "float32", "bfloat16". threads: CPU threads of the worker;
    0 leaves torch's choice.
    """

    def __init__(self, *, device: str = "auto", dtype: str = "auto", max_batch_rows: int = 128, threads: int = 0):
        self._device = torch_device(device, "engine.device")
        self._dtype = resolve_dtype(dtype, self._device)
        self._max_rows = max_batch_rows
        self._threads = threads
        self._desk = _Desk()
        self._running: list[_Job] = []
        self._restarts = 0
        self._version, self._root = 0, ""
        self._worker: Thread | None = None
        self._model: PreTrainedModel | None = None
        self._vocab_size = self._context_tokens = 0

    @property
    def info(self) -> EngineInfo:
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        return EngineInfo(
            kind="transformers", version=transformers.__version__, device=name, dtype=str(self._dtype).split(".")[-1]
        )

    @property
    def restarts(self) -> int:
        """Times that a failed batch was thrown away."""
        return self._restarts

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    async def start(self, model_dir: Path, weights: Weights, version: int, root: str) -> None:
        """Raises InputMissingError or ConfigError for an unusable model_dir, InvalidWeightsError for other weights."""

        def build() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, frozenset[int]]:
            tokenizer = load_tokenizer(model_dir)
            model = build_model(model_dir, self._device, self._dtype)
            copy_into_model(pair_tensors(model, weights))
            return model, tokenizer, end_token_ids(model_dir, model.config, tokenizer)

        self._model, tokenizer, end_ids = await asyncio.to_thread(build)
        text_config = self._model.config.get_text_config()
        self._vocab_size = int(text_config.vocab_size)
        self._context_tokens = int(getattr(text_config, "max_position_embeddings", 0) or 1 << 30)
        self._version, self._root = version, root

        def text_of(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        batch = RunningBatch(self._model, end_ids, 0, text_of)
        self._worker = Thread(target=self._work, args=(batch,), name="engine", daemon=True)
        self._worker.start()

    async def generate(self, request: GenerateRequest) -> Generated:
        """See the protocol. Cancelling the call frees its rows at the next token."""
        self._check(request)
        numbers = Request.of(request, self._context_tokens)
        loop = asyncio.get_running_loop()
        job = _Job(request=numbers, answer=loop.create_future(), loop=loop)
        with self._open_desk() as desk:
            desk.waiting.append(job)
        try:
            return await job.answer
        except asyncio.CancelledError:
            numbers.cancelled = True
            self._wake()
            raise

    async def load(self, weights: Weights, version: int, root: str) -> float:
        """See the protocol. Raises InvalidWeightsError before anything is changed."""
        if self._model is None:
            raise EngineError("the engine has not been started: call start first")
        model = self._model
        tensors = await asyncio.to_thread(pair_tensors, model, weights)
        loop = asyncio.get_running_loop()
        load = _Load(tensors=tensors, version=version, root=root, answer=loop.create_future(), loop=loop)
        with self._open_desk() as desk:
            desk.loads.append(load)
        return await load.answer

    async def close(self) -> None:
        """Ends the worker; calls in progress fail with EngineError."""
        with self._desk.changed:
            self._desk.closing = True
            self._desk.changed.notify()
        if self._worker is not None:
            await asyncio.to_thread(self._worker.join)

    def _check(self, request: GenerateRequest) -> None:
        prompt = request.prompt_token_ids
        if not prompt or request.completions < 1 or request.sampling.max_completion_tokens < 1:
            raise EngineError("a request needs a prompt, at least one completion and at least one token")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise EngineError(f"a prompt has a token outside of the vocabulary of {self._vocab_size}")
        if len(prompt) >= self._context_tokens:
            raise EngineError(f"a prompt of {len(prompt)} tokens fills the context of {self._context_tokens}")

    @contextmanager
    def _open_desk(self) -> Generator[_Desk]:
        """Hands something to the worker."""
        with self._desk.changed:
            if self._desk.closing or self._worker is None:
                raise EngineError("the engine is not running: start it first")
            yield self._desk
            self._desk.changed.notify()

    def _wake(self) -> None:
        with self._desk.changed:
            self._desk.changed.notify()

    # --- the worker thread ---

    def _work(self, batch: RunningBatch) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while self._await_work(batch):
                try:
                    self._drop_cancelled(batch)
                    if not batch.active and not self._running:
                        self._load_all()
                    self._admit(batch)
                    batch.step()
                except Exception as error:  # the thread's end: whatever it was, the callers must hear of it
                    self._give_up(batch, error)
                self._resolve()
        self._fail_everything("the engine was closed")

    def _await_work(self, batch: RunningBatch) -> bool:
        desk = self._desk
        with desk.changed:
            desk.changed.wait_for(lambda: batch.active or self._running or desk.waiting or desk.loads or desk.closing)
            return not desk.closing

    def _drop_cancelled(self, batch: RunningBatch) -> None:
        cancelled = [job for job in self._running if job.request.cancelled]
        if cancelled:
            self._running = [job for job in self._running if not job.request.cancelled]
            batch.drop_cancelled()
        with self._desk.changed:
            for job in [job for job in self._desk.waiting if job.request.cancelled]:
                self._desk.waiting.remove(job)

    def _admit(self, batch: RunningBatch) -> None:
        """Rows for requests that are partly in, then for waiting ones unless a load is due."""
        free = self._max_rows - batch.active
        with self._desk.changed:
            partly = [job for job in self._running if job.admitted < job.request.asked.completions]
            waiting = [] if self._desk.loads else list(self._desk.waiting)
        wanted = sum(job.request.asked.completions - job.admitted for job in (*partly, *waiting))
        if not wanted or free < min(wanted, max(1, int(self._max_rows * _ADMIT_SHARE))):
            return
        rows: list[Row] = []
        for job in (*partly, *waiting):
            count = min(job.request.asked.completions - job.admitted, free - len(rows))
            if count <= 0:
                break
            if not job.admitted:
                self._desk.waiting.remove(job)
                self._running.append(job)
                job.started = time.monotonic()
            rows += [Row(request=job.request, index=job.admitted + index) for index in range(count)]
            job.admitted += count
        batch.admit(rows)

    def _resolve(self) -> None:
        """Answers the requests whose completions are all there."""
        still: list[_Job] = []
        for job in self._running:
            done = [drawn for drawn in job.request.results if drawn is not None]
            if len(done) < job.request.asked.completions:
                still.append(job)
                continue
            job.resolve(self._generated(done, time.monotonic() - job.started))
        self._running = still

    def _generated(self, completions: list[Drawn], seconds: float) -> Generated:
        return Generated(
            completions=tuple(completions), policy_version=self._version, policy_root=self._root, seconds=seconds
        )

    def _load_all(self) -> None:
        while self._desk.loads:
            load = self._desk.loads.popleft()
            started = time.monotonic()
            try:
                copy_into_model(load.tensors)
            except RuntimeError as error:
                _settle(load.loop, load.answer, EngineError(f"loading version {load.version} failed: {error}"))
                continue
            self._version, self._root = load.version, load.root
            _settle(load.loop, load.answer, time.monotonic() - started)

    def _give_up(self, batch: RunningBatch, error: Exception) -> None:
        batch.clear()
        self._restarts += 1
        if isinstance(error, torch.OutOfMemoryError):
            self._max_rows = max(1, self._max_rows // 2)
        _log.error("batch_failed", exc_info=error, requests=len(self._running), max_batch_rows=self._max_rows)
        failure = EngineError(f"generating failed ({type(error).__name__}: {error}); the group is made again")
        for job in self._running:
            job.resolve(failure)
        self._running = []

    def _fail_everything(self, reason: str) -> None:
        for job in (*self._running, *self._desk.waiting):
            job.resolve(EngineError(reason))
        for load in self._desk.loads:
            _settle(load.loop, load.answer, EngineError(reason))


def _settle(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[_T], outcome: _T | HeteroRLError) -> None:
    """Puts an outcome into a future of another thread's loop; a caller that has gone is not an error."""

    def put() -> None:
        if answer.done():
            return
        if isinstance(outcome, HeteroRLError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    if not loop.is_closed():
        loop.call_soon_threadsafe(put)

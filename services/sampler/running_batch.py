"""The rows that are being decoded together, one token per step.

    admit: prefill distinct prompts once, one row per completion ─┐
    step:  draw from logits → record → rows that end leave ───────┴─► forward → logits

Rows are independent: each has its own random numbers, temperature and limit. Axes: B rows, T completion tokens,
V vocabulary, C cache columns. Everything here runs in the engine's one thread.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from services.sampler.engine import Drawn, GenerateRequest
from services.sampler.kv_cache import append_rows, length_of, new_cache, select_rows
from services.sampler.sampling import draw, uniforms
from services.wire.types import FinishReason

# Rows that ended cost compute until they are cut out, and cutting copies the cache: cut when this share has ended.
_DEAD_SHARE = 1 / 8


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request in the engine: what was asked, its random numbers, and which of its rows are done."""

    asked: GenerateRequest
    limit: int
    uniforms: Tensor
    results: list[Drawn | None]
    cancelled: bool = False

    @classmethod
    def of(cls, asked: GenerateRequest, context_tokens: int) -> "Request":
        """`limit`: tokens per completion, also bounded by what the model's context leaves after the prompt."""
        return cls(
            asked=asked,
            limit=min(asked.sampling.max_completion_tokens, context_tokens - len(asked.prompt_token_ids)),
            uniforms=uniforms(asked.sampling, asked.completions, asked.seed),
            results=[None] * asked.completions,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Completion `index` of a request."""

    request: Request
    index: int


@dataclass(slots=True, kw_only=True)
class _RowTensors:
    """One entry per row. `padding`: masked columns on the left. `steps`: tokens drawn so far."""

    logits: Tensor  # BV float32
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    limit: Tensor
    steps: Tensor
    positions: Tensor
    padding: Tensor
    alive: Tensor
    uniforms: Tensor  # BT float32
    tokens: Tensor  # BT int64
    logprobs: Tensor  # BT float32

    def select(self, rows: Tensor) -> "_RowTensors":
        return _RowTensors(**{f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)})

    def append(self, more: "_RowTensors") -> "_RowTensors":
        return _RowTensors(**{f.name: _stack(getattr(self, f.name), getattr(more, f.name)) for f in fields(self)})


class RunningBatch:
    """Decodes admitted rows. Not thread-safe; every method must be called under `torch.inference_mode`."""

    def __init__(
        self, model: PreTrainedModel, end_ids: Iterable[int], pad_id: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._model = model
        self._device = model.device
        self._pad_id = pad_id
        self._decode = decode
        self._is_end = torch.zeros(int(model.config.get_text_config().vocab_size), dtype=torch.bool)
        self._is_end[[token for token in end_ids if token < len(self._is_end)]] = True
        self._is_end = self._is_end.to(self._device)
        self._rows: list[Row | None] = []
        self._tensors: _RowTensors | None = None
        self._cache: Cache = new_cache()

    @property
    def active(self) -> int:
        """Rows that have not ended."""
        return sum(row is not None for row in self._rows)

    def clear(self) -> None:
        self._rows, self._tensors, self._cache = [], None, new_cache()

    def admit(self, rows: Sequence[Row]) -> None:
        """Prefills and adds rows; rows of one request share one prefill of their prompt."""
        requests = list({id(row.request): row.request for row in rows}.values())
        prompt_of = {id(request): index for index, request in enumerate(requests)}
        cache, logits, padding = self._prefill([request.asked.prompt_token_ids for request in requests])
        source = torch.tensor([prompt_of[id(row.request)] for row in rows], device=self._device)
        select_rows(cache, source, 0)
        tensors = self._tensors_for(rows, logits.index_select(0, source), padding.index_select(0, source))
        self._compact()
        if self._tensors is None:
            self._rows, self._tensors, self._cache = list(rows), tensors, cache
            return
        ours, theirs = length_of(self._cache), length_of(cache)
        self._tensors.padding += max(0, theirs - ours)
        tensors.padding += max(0, ours - theirs)
        append_rows(self._cache, cache)
        self._rows.extend(rows)
        self._tensors = self._tensors.append(tensors)

    def step(self) -> int:
        """One token for every row; results of rows that end are put into their requests. Returns tokens drawn."""
        state = self._tensors
        if state is None:
            return 0
        at = state.steps.clamp(max=state.uniforms.shape[1] - 1)[:, None]
        token_B, logprob_B = draw(
            state.logits,
            state.temperature,
            state.top_p if bool((state.top_p < 1).any()) else None,
            state.top_k if bool((state.top_k > 0).any()) else None,
            state.uniforms.gather(1, at)[:, 0],
        )
        state.tokens.scatter_(1, at, token_B[:, None])
        state.logprobs.scatter_(1, at, logprob_B[:, None])
        state.steps += 1
        drawn = self.active
        self._finish(state, self._is_end[token_B])
        if 1 - self.active / len(self._rows) >= _DEAD_SHARE:
            kept = [index for index, row in enumerate(self._rows) if row is not None]
            token_B = token_B[torch.tensor(kept, dtype=torch.int64, device=self._device)]
            self._compact()
        if self._tensors is not None:
            self._advance(self._tensors, token_B)
        return drawn

    def drop_cancelled(self) -> None:
        """Rows of cancelled requests end without a result."""
        for index, row in enumerate(self._rows):
            if row is not None and row.request.cancelled:
                self._rows[index] = None
                assert self._tensors is not None
                self._tensors.alive[index] = False
        self._compact()

    def _finish(self, state: _RowTensors, at_end_B: Tensor) -> None:
        stopped = at_end_B | self._at_stop_text(state)
        ended = (stopped | (state.steps >= state.limit)) & state.alive
        state.alive &= ~ended
        places = ended.nonzero()[:, 0]
        if not len(places):
            return
        # Whole tensors at once: from a GPU, a transfer per row would take longer than the step.
        counts = state.steps[places].tolist()
        tokens = state.tokens[places, : max(counts)].tolist()
        logprobs = state.logprobs[places, : max(counts)].clamp(max=0.0).tolist()
        at_stop = stopped[places].tolist()
        for place, index in enumerate(places.tolist()):
            row = self._rows[index]
            assert row is not None
            row.request.results[row.index] = Drawn(
                token_ids=tuple(tokens[place][: counts[place]]),
                logprobs=tuple(logprobs[place][: counts[place]]),
                finish_reason=FinishReason.STOP if at_stop[place] else FinishReason.LENGTH,
            )
            self._rows[index] = None

    def _at_stop_text(self, state: _RowTensors) -> Tensor:
        """Rows whose text now holds a stop text. Only the tail is decoded: the text before was seen to be clear."""
        found = torch.zeros_like(state.alive)
        for index, row in enumerate(self._rows):
            if row is None or not row.request.asked.sampling.stop:
                continue
            stops = row.request.asked.sampling.stop
            count = int(state.steps[index])
            # A character takes at most four byte-level tokens; four more for what decoders do at a text's beginning.
            first = max(0, count - 4 * max(map(len, stops)) - 4)
            tail = self._decode(state.tokens[index, first:count].tolist())
            found[index] = any(stop in tail for stop in stops)
        return found

    def _compact(self) -> None:
        """Cuts out rows that ended and columns that are padding for all."""
        if self._tensors is None or all(row is not None for row in self._rows):
            return
        kept = [index for index, row in enumerate(self._rows) if row is not None]
        if not kept:
            self.clear()
            return
        rows = torch.tensor(kept, device=self._device)
        self._rows = [self._rows[index] for index in kept]
        self._tensors = self._tensors.select(rows)
        first_column = int(self._tensors.padding.min())
        self._tensors.padding -= first_column
        select_rows(self._cache, rows, first_column)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor, Tensor]:
        longest = max(map(len, prompts))
        padded = [[self._pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self._device)
        positions = (torch.arange(longest, device=self._device)[None] - padding[:, None]).clamp(min=0)
        cache = new_cache()
        logits = self._forward(torch.tensor(padded, device=self._device), positions, padding, cache)
        return cache, logits, padding

    def _advance(self, state: _RowTensors, token_B: Tensor) -> None:
        state.logits = self._forward(token_B[:, None], state.positions[:, None], state.padding, self._cache)
        state.positions += 1

    def _forward(self, tokens: Tensor, positions: Tensor, padding: Tensor, cache: Cache) -> Tensor:
        """Float32 logits of the last column. The cache grows by the columns of `tokens`."""
        columns = tokens.shape[1] + (length_of(cache) if cache.layers else 0)
        mask = torch.arange(columns, device=self._device)[None] >= padding[:, None]
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _tensors_for(self, rows: Sequence[Row], logits: Tensor, padding: Tensor) -> _RowTensors:
        settings = [row.request.asked.sampling for row in rows]
        width = max(sampling.max_completion_tokens for sampling in settings)
        count, device = len(rows), self._device
        numbers = torch.zeros((count, width))
        for request in {id(row.request): row.request for row in rows}.values():
            own = [(place, row.index) for place, row in enumerate(rows) if row.request is request]
            drawn = request.uniforms[[index for _, index in own]]
            numbers[[place for place, _ in own], : drawn.shape[1]] = drawn
        lengths = [len(row.request.asked.prompt_token_ids) for row in rows]
        return _RowTensors(
            logits=logits,
            temperature=torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device),
            top_p=torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=device),
            top_k=torch.tensor([s.top_k for s in settings], device=device),
            limit=torch.tensor([row.request.limit for row in rows], device=device),
            steps=torch.zeros(count, dtype=torch.int64, device=device),
            positions=torch.tensor(lengths, device=device),
            padding=padding,
            alive=torch.ones(count, dtype=torch.bool, device=device),
            uniforms=numbers.to(device),
            tokens=torch.zeros((count, width), dtype=torch.int64, device=device),
            logprobs=torch.zeros((count, width), device=device),
        )


def _stack(upper: Tensor, lower: Tensor) -> Tensor:
    """Concatenates rows; the narrower one is filled with zeros on the right."""
    if upper.dim() == 2 and upper.shape[1] != lower.shape[1]:
        width = max(upper.shape[1], lower.shape[1])
        upper = torch.nn.functional.pad(upper, (0, width - upper.shape[1]))
        lower = torch.nn.functional.pad(lower, (0, width - lower.shape[1]))
    return torch.cat((upper, lower))

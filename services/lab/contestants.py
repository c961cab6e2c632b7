"""The policies of an experiment: built, warmed up to a given accuracy, and drawn from.

make_model ─► warm_up (supervised) ─► Policy for production's trainer
                                 └──► Drawer, one per sampler: weights of a version in, completions out
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from services.lab.column_policy import ColumnConfig, ColumnModel
from services.lab.sum_tasks import EOS, PAD, VOCAB_SIZE, Problems, SumTask, TaskName
from services.sampler.engine import GenerateRequest
from services.sampler.running_batch import Request, Row, RunningBatch
from services.sampler.sampling import draw, uniforms
from services.wire.types import FinishReason, SamplingSettings

Snapshot = Mapping[str, Tensor]
"""A version's weights: copies that nobody writes to."""


class PolicyName(StrEnum):
    COLUMNS = "columns"
    """The two-layer network of `column_policy`, 10,000 parameters: seconds per run."""
    SMALL = "small"
    """A Qwen3 transformer of 0.1 million parameters: minutes per run on a CPU core."""
    LARGE = "large"
    """A Qwen3 transformer of 3.2 million parameters: for a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """B completions, rows of one problem adjacent; PAD and 0 behind each end."""

    tokens_BT: Tensor
    logprobs_BT: Tensor
    length_B: Tensor
    stopped_B: Tensor
    """False for completions that were cut at the limit."""


class Drawer(Protocol):
    def load(self, weights: Snapshot) -> None:
        """Draws with `weights` from now on."""
        ...

    def draw(self, problems: Problems, completions: int, seed: int) -> Drawn:
        """`completions` for each problem at temperature 1; the same seed and weights, the same draws."""
        ...


def make_model(name: PolicyName, task: SumTask, seed: int) -> PreTrainedModel:
    """Untrained, float32, on the CPU; the same seed, the same weights. Raises ValueError where the two do not fit."""
    if name is PolicyName.COLUMNS:
        if task.name is TaskName.WORKED:
            raise ValueError("the policy of columns cannot write out its working: take the small or large policy")
        return ColumnModel(ColumnConfig(columns=task.columns, max_tokens=task.max_tokens), seed)
    hidden, layers, heads = (64, 2, 2) if name is PolicyName.SMALL else (256, 4, 4)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=task.prompt_tokens + task.max_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def make_drawer(name: PolicyName, task: SumTask, device: torch.device) -> Drawer:
    model = make_model(name, task, seed=0).to(device)  # pyright: ignore[reportArgumentType] - its own self
    if isinstance(model, ColumnModel):
        return ColumnDrawer(model, task)
    return TransformerDrawer(model, task)


class ColumnDrawer:
    """All rows at once, one column after the other."""

    def __init__(self, model: ColumnModel, task: SumTask) -> None:
        self._model, self._task = model, task

    def load(self, weights: Snapshot) -> None:
        self._model.load_state_dict(weights)

    @torch.inference_mode()
    def draw(self, problems: Problems, completions: int, seed: int) -> Drawn:
        prompts_BL = problems.prompts_PL.repeat_interleave(completions, 0)
        rows, limit = prompts_BL.shape[0], self._task.max_tokens
        numbers_BT = uniforms(_sampling(self._task), rows, seed)
        tokens_BT = torch.zeros((rows, limit), dtype=torch.int64)
        logprobs_BT = torch.zeros((rows, limit))
        alive_B = torch.ones(rows, dtype=torch.bool)
        ones_B = torch.ones(rows)
        for place in range(limit):
            slots = self._model.visible(prompts_BL, tokens_BT[:, :place], place + 1)[:, place:]
            logits_BV = self._model.read(slots, torch.tensor([place]))[:, 0]
            token_B, logprob_B = draw(logits_BV, ones_B, None, None, numbers_BT[:, place])
            tokens_BT[:, place] = torch.where(alive_B, token_B, PAD)
            logprobs_BT[:, place] = torch.where(alive_B, logprob_B, 0.0)
            if self._task.stops_at_end:
                alive_B = alive_B & (token_B != EOS)
        return _drawn(self._task, tokens_BT, logprobs_BT)


class TransformerDrawer:
    """Production's running batch of the transformers engine."""

    def __init__(self, model: PreTrainedModel, task: SumTask) -> None:
        self._model, self._task = model, task

    def load(self, weights: Snapshot) -> None:
        self._model.load_state_dict(weights, strict=False)  # the tied head is the embedding

    @torch.inference_mode()
    def draw(self, problems: Problems, completions: int, seed: int) -> Drawn:
        prompts = [tuple(prompt) for prompt in problems.prompts_PL.tolist()]
        context = self._task.prompt_tokens + self._task.max_tokens
        requests = [
            Request.of(
                GenerateRequest(
                    prompt_token_ids=prompt, completions=completions, sampling=_sampling(self._task), seed=seed + index
                ),
                context,
            )
            for index, prompt in enumerate(prompts)
        ]
        rows = [Row(request=request, index=index) for request in requests for index in range(completions)]
        batch = RunningBatch(self._model, [EOS] if self._task.stops_at_end else [], PAD, lambda ids: "")
        batch.admit(rows)
        while batch.active:
            batch.step()
        drawn = [result for request in requests for result in request.results if result is not None]
        assert len(drawn) == len(rows), "every row of a batch that is not active has ended"
        length_B = torch.tensor([len(result.token_ids) for result in drawn])
        written_BT = torch.arange(self._task.max_tokens) < length_B[:, None]
        tokens_BT = torch.zeros(written_BT.shape, dtype=torch.int64)
        tokens_BT[written_BT] = torch.tensor([token for result in drawn for token in result.token_ids])
        logprobs_BT = torch.zeros(written_BT.shape)
        logprobs_BT[written_BT] = torch.tensor([logprob for result in drawn for logprob in result.logprobs])
        return _drawn(self._task, tokens_BT, logprobs_BT)


def _sampling(task: SumTask) -> SamplingSettings:
    return SamplingSettings(temperature=1.0, max_completion_tokens=task.max_tokens)


def _drawn(task: SumTask, tokens_BT: Tensor, logprobs_BT: Tensor) -> Drawn:
    if not task.stops_at_end:
        whole_B = torch.full((len(tokens_BT),), task.max_tokens)
        return Drawn(
            tokens_BT=tokens_BT, logprobs_BT=logprobs_BT, length_B=whole_B, stopped_B=torch.ones_like(whole_B).bool()
        )
    stopped_B = (tokens_BT == EOS).any(1)
    length_B = torch.where(stopped_B, (tokens_BT == EOS).int().argmax(1) + 1, task.max_tokens)
    return Drawn(tokens_BT=tokens_BT, logprobs_BT=logprobs_BT, length_B=length_B, stopped_B=stopped_B)


def finish_reasons(drawn: Drawn) -> list[FinishReason]:
    return [FinishReason.STOP if stopped else FinishReason.LENGTH for stopped in drawn.stopped_B.tolist()]


def snapshot(model: PreTrainedModel) -> Snapshot:
    """Copies of the weights on their device, tied ones once each name."""
    return {name: tensor.detach().clone() for name, tensor in cast("dict[str, Tensor]", model.state_dict()).items()}


def expected_accuracy(model: PreTrainedModel, problems: Problems) -> float:
    """Mean chance of drawing the one right answer at temperature 1: no sampling noise. For tasks with `one_answer`."""
    with torch.inference_mode():
        return float(_answer_logprobs(model, problems).exp().mean())


def supervise(model: PreTrainedModel, task: SumTask, *, until: float, lr: float, seed: int, most_steps: int) -> int:
    """Trains on right answers until `expected_accuracy` (for `worked`: of the one full working) reaches `until`.

    Returns the number of steps. Raises ValueError where `most_steps` do not reach it.
    """
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    judged = to_device(task.draw(512, seed=-1 - seed & 0x7FFFFFFF), device)
    for step in range(most_steps):
        if step % 5 == 0 and expected_accuracy(model, judged) >= until:
            return step
        problems = to_device(task.draw(128, seed=seed * 1_000_003 + step), device)
        loss = -_answer_logprobs(model, problems).sum() / (problems.answers_PT != PAD).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise ValueError(f"{most_steps} supervised steps did not reach an accuracy of {until:g}: lower arena.warm_up")


def to_device(problems: Problems, device: torch.device) -> Problems:
    return Problems(
        prompts_PL=problems.prompts_PL.to(device),
        answers_PT=problems.answers_PT.to(device),
        sums_P=problems.sums_P.to(device),
    )


def _answer_logprobs(model: PreTrainedModel, problems: Problems) -> Tensor:
    """log p of each problem's answer as it is supervised, [P]."""
    prompt = problems.prompts_PL.shape[1]
    ids_PL = torch.cat([problems.prompts_PL, problems.answers_PT], 1)
    logits = cast(Tensor, model(input_ids=ids_PL, attention_mask=torch.ones_like(ids_PL)).logits)
    logprobs_PTV = torch.log_softmax(logits[:, prompt - 1 : -1].float(), dim=-1)
    found_PT = logprobs_PTV.gather(-1, problems.answers_PT[..., None])[..., 0]
    return torch.where(problems.answers_PT != PAD, found_PT, 0.0).sum(1)

"""A policy that adds in milliseconds: a two-layer network that sees the columns which the next digit needs.

    a_t b_t  a_t-1 b_t-1  s_t-1  t ─► one embedding each, summed ─► ReLU ─► H×H ─► ReLU ─► logits of s_t

As a causal model it fits production's trainer: `input_ids [B, L]` in, `logits [B, L, V]` out. Attention is not learned
but given, which is what makes 600 steps of reinforcement learning a matter of seconds.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from services.lab.sum_tasks import BLANK, PAD, VOCAB_SIZE

_SLOTS = 5


class ColumnConfig(PretrainedConfig):
    """`columns` of the prompt, `hidden_size`, `max_tokens` of a completion."""

    model_type = "heterorl_columns"

    def __init__(self, columns: int = 5, hidden_size: int = 64, max_tokens: int = 8, **kwargs: object) -> None:
        self.columns = columns
        self.hidden_size = hidden_size
        self.max_tokens = max_tokens
        self.vocab_size = VOCAB_SIZE
        super().__init__(**kwargs)  # pyright: ignore[reportArgumentType] - its keywords are only known one by one


class ColumnModel(PreTrainedModel):
    config_class = ColumnConfig

    def __init__(self, config: ColumnConfig, seed: int) -> None:
        super().__init__(config)
        self._columns = config.columns
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.slots = torch.nn.Embedding(_SLOTS * VOCAB_SIZE, config.hidden_size)
            self.places = torch.nn.Embedding(config.max_tokens + 1, config.hidden_size)  # one after the end
            self.middle = torch.nn.Linear(config.hidden_size, config.hidden_size)
            self.head = torch.nn.Linear(config.hidden_size, VOCAB_SIZE)
        self.register_buffer("offsets", torch.arange(_SLOTS) * VOCAB_SIZE, persistent=False)

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """None: the head has a bias, so the learner takes the logits as they are."""
        return None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Logits of each next token, 0 inside the prompt. The mask is not read: padding stands at the end."""
        first = 2 * self._columns - 1
        completion = input_ids.shape[1] - first
        slots_BTS = self.visible(input_ids[:, : first + 1], input_ids[:, first + 1 :], completion)
        logits_BTV = self.read(slots_BTS, torch.arange(completion, device=input_ids.device))
        return CausalLMOutput(logits=cast(torch.FloatTensor, functional.pad(logits_BTV, (0, 0, first, 0))))

    def visible(self, prompts_BL: Tensor, written_BT: Tensor, count: int) -> Tensor:
        """The tokens that the predictions of the first `count` completion tokens see, [B, count, 5]."""
        after = max(0, count - self._columns)
        columns = [functional.pad(prompts_BL[:, side::2], (1, after), value=BLANK) for side in (0, 1)]
        written = functional.pad(written_BT, (1, 0), value=PAD)[:, :count]
        now, before = (slice(1, count + 1), slice(0, count))
        return torch.stack([*(c[:, now] for c in columns), *(c[:, before] for c in columns), written], dim=-1)

    def read(self, slots_BTS: Tensor, places_T: Tensor) -> Tensor:
        """Logits [B, T, V] from what is visible."""
        seen = self.slots(slots_BTS + cast(Tensor, self.offsets)).sum(-2) + self.places(places_T)
        return self.head(torch.relu(self.middle(torch.relu(seen))))

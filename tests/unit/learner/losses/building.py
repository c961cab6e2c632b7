"""Cases of the oracle as tensors, padded with garbage; random cases; Hypothesis strategies."""

import math
import random

import torch
from hypothesis import strategies as st
from torch import Tensor

from services.learner.losses.batch import Batch
from services.learner.losses.evaluate import LossOutput, loss_of
from services.learner.losses.prepare import prepare
from services.learner.losses.settings import LossSettings
from tests.unit.learner.losses.oracle import Case

GARBAGE = (math.nan, math.inf, -math.inf, 7.0, -1e30)


def padded(rows: list[list[float]], width: int, seed: int = 0) -> Tensor:
    """float64 [B, width]; what stands behind a row's end is garbage."""
    rng = random.Random(seed)
    return torch.tensor(
        [[*row, *(rng.choice(GARBAGE) for _ in range(width - len(row)))] for row in rows], dtype=torch.float64
    ).reshape(len(rows), width)


def batch_of(case: Case, extra_columns: int = 0) -> Batch:
    width = max(max(map(len, case.logp)), 1) + extra_columns
    mask_BT = torch.tensor([[t < len(row) for t in range(width)] for row in case.logp])
    return Batch(
        sampler_logprobs_BT=padded(case.logq, width, 1),
        mask_BT=mask_BT,
        rewards_B=torch.tensor(case.rewards, dtype=torch.float64),
        group_B=torch.tensor(case.groups),
        staleness_B=None if case.staleness is None else torch.tensor(case.staleness),
        overlong_B=None if case.overlong is None else torch.tensor(case.overlong),
        proximal_logprobs_BT=None if case.prox is None else padded(case.prox, width, 2),
        reference_logprobs_BT=None if case.ref is None else padded(case.ref, width, 3),
    )


def settings_of(case: Case) -> LossSettings:
    return LossSettings.model_validate({"name": case.loss, **case.options})


def learner_of(case: Case, extra_columns: int = 0) -> Tensor:
    width = max(max(map(len, case.logp)), 1) + extra_columns
    return padded(case.logp, width, 4).requires_grad_()


def evaluate(case: Case, extra_columns: int = 0) -> tuple[LossOutput, Tensor]:
    """Output and gradient [B, T] of the whole case as one micro-batch."""
    learner_BT = learner_of(case, extra_columns)
    output = loss_of(prepare(batch_of(case, extra_columns), settings_of(case)), learner_BT)
    output.loss.backward()
    assert learner_BT.grad is not None
    return output, learner_BT.grad


def random_case(loss: str, seed: int, *, prompts: int = 3, size: int = 4, gap: float = 0.3, **options: object) -> Case:
    """Groups of `size` rows in shuffled order, 1 to 7 tokens, learner within about `gap` nats of the sampler."""
    rng = random.Random(seed)
    groups = [p for p in range(prompts) for _ in range(size)]
    rng.shuffle(groups)
    lengths = [rng.randint(1, 7) for _ in groups]
    logq = [[-rng.expovariate(1.0) - 1e-3 for _ in range(n)] for n in lengths]
    near = lambda row: [min(x + rng.gauss(0.0, gap), -1e-6) for x in row]  # noqa: E731
    return Case(
        loss=loss,
        logp=[near(row) for row in logq],
        logq=logq,
        prox=[near(row) for row in logq],
        ref=[near(row) for row in logq],
        rewards=[float(rng.random() < 0.5) for _ in groups],
        groups=groups,
        staleness=[3 * group for group in groups],
        options=dict(options),
    )


@st.composite
def cases(draw: st.DrawFn, losses: list[str]) -> Case:
    """Ragged rows, log-probs from -1e-6 to -5,000 per token, two or three groups in any order."""
    loss = draw(st.sampled_from(losses))
    prompts, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    groups = draw(st.permutations([p for p in range(prompts) for _ in range(size)]))
    scale = draw(st.sampled_from([1.0, 100.0, 5000.0]))
    logprob = st.floats(-scale, -1e-6)
    logq = [draw(st.lists(logprob, min_size=1, max_size=4)) for _ in groups]
    shift = st.floats(-2.0, 2.0)
    logp = [[max(min(x + draw(shift), -1e-6), -5000.0) for x in row] for row in logq]
    rewards = [draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in groups]
    return Case(loss=loss, logp=logp, logq=logq, rewards=rewards, groups=list(groups))

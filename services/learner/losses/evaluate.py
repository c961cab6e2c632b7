"""Phase two, once per micro-batch: the loss of some rows, whose sum over micro-batches is the loss of the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.learner.losses.kl import kl_terms
from services.learner.losses.metrics import PartialMetrics, partial_metrics
from services.learner.losses.prepared import Prepared
from services.learner.losses.ratio import Rows, Terms
from services.learner.losses.settings import KlTarget
from services.learner.losses.table import LOSSES


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    loss: Tensor
    """float64 scalar. Sum it over micro-batches and ranks: where gradients are averaged over R ranks, multiply by R."""
    metrics: PartialMetrics


def loss_of(prepared: Prepared, learner_logprobs_BT: Tensor, entropy_BT: Tensor | None = None) -> LossOutput:
    """Loss of the rows of `prepared` under the learner's log-probs [b, t] of the same tokens, at any float type.

    A row with a NaN or infinite learner's log-prob adds nothing and is counted. `entropy_BT`, of the learner's
    distribution at each token, is only reported. Raises ValueError where shapes differ.
    """
    rows = rows_of(prepared, learner_logprobs_BT)
    terms = LOSSES[prepared.dials.name].function(rows)
    weight_B = prepared.coefficient_B * rows.mask_BT.any(1)
    if terms.objective.ndim == 2:
        loss = -(weight_B[:, None] * torch.where(rows.mask_BT, terms.objective, 0.0)).sum()
    else:
        loss = -(weight_B * prepared.length_B * terms.objective).sum()
    settings = prepared.dials.settings
    if settings.kl_beta > 0.0:
        target_BT = rows.log_q_BT if settings.kl_target is KlTarget.SAMPLER else prepared.reference_logprobs_BT
        if target_BT is None:
            raise ValueError('kl_target = "reference" needs the reference model\'s log-probs')
        kl_BT = kl_terms(rows.log_p_BT, target_BT, settings.kl_estimator)
        loss = loss + settings.kl_beta * (weight_B[:, None] * torch.where(rows.mask_BT, kl_BT, 0.0)).sum()
    return LossOutput(loss=loss, metrics=partial_metrics(rows, terms, loss.detach(), entropy_BT))


def terms_of(prepared: Prepared, learner_logprobs_BT: Tensor) -> Terms:
    """The objective, weights and cuts of each row or token, before aggregation; meaningless for excluded rows."""
    return LOSSES[prepared.dials.name].function(rows_of(prepared, learner_logprobs_BT))


def rows_of(prepared: Prepared, learner_logprobs_BT: Tensor) -> Rows:
    """The micro-batch in float64, emptied where it must not be read.

    `torch.where` acts on the input, so that NaN in the padding reaches neither the loss nor, as 0 · NaN, a gradient.
    """
    if learner_logprobs_BT.shape != prepared.mask_BT.shape:
        shapes = f"{list(learner_logprobs_BT.shape)} but the mask is {list(prepared.mask_BT.shape)}"
        raise ValueError(f"the learner's log-probs are {shapes}")
    with torch.no_grad():
        finite_B = torch.isfinite(torch.where(prepared.mask_BT, learner_logprobs_BT, 0.0)).all(1)
        mask_BT = prepared.mask_BT & finite_B[:, None]
    return Rows(
        log_p_BT=torch.where(mask_BT, learner_logprobs_BT, 0.0).double(),
        log_q_BT=torch.where(mask_BT, prepared.sampler_logprobs_BT, 0.0),
        mask_BT=mask_BT,
        prepared=prepared,
    )

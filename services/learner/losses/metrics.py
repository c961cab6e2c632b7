"""What a step reports about its weights. Partial sums add up exactly over micro-batches, in any cut and order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.learner.losses.kl import kl_terms
from services.learner.losses.prepared import Exclusion
from services.learner.losses.ratio import Rows, Terms, capped_exp
from services.learner.losses.settings import KlEstimator

QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialMetrics:
    """One micro-batch's share, detached. From another rank, send it whole: quantiles need the weights."""

    sums: dict[str, Tensor]
    """name -> float64 scalar."""
    weights: Tensor
    """Importance weights of the rows, or tokens, that count: float64 [n]."""


@torch.no_grad()
def partial_metrics(rows: Rows, terms: Terms, loss: Tensor, entropy_BT: Tensor | None) -> PartialMetrics:
    """The sums that `finish_metrics` divides."""
    prepared = rows.prepared
    part_B = rows.mask_BT.any(1)
    token_weights = terms.weight.ndim == 2
    cut = terms.cut & (rows.mask_BT if terms.cut.ndim == 2 else part_B)
    row_weight_B = terms.weight
    if token_weights:
        row_weight_B = torch.where(rows.mask_BT, terms.weight, 0.0).sum(1) / prepared.length_B.clamp(min=1.0)
    ratio_B = capped_exp(rows.log_p_B - rows.log_q_B)
    e_over_mean_B = (prepared.log_expected_q_B - prepared.log_mean_q_B).exp()
    sums = {
        "loss": loss,
        "rows": part_B.sum(),
        "tokens": rows.mask_BT.sum(),
        "cut": cut.sum(),
        "cut_terms": rows.mask_BT.sum() if terms.cut.ndim == 2 else part_B.sum(),
        "e_over_mean_q": _over(part_B, e_over_mean_B),
        "advantage": _over(part_B, prepared.advantage_B),
        "advantage_square": _over(part_B, prepared.advantage_B.square()),
        "ratio": _over(part_B, ratio_B),
        "ratio_advantage": _over(part_B, ratio_B * prepared.advantage_B),
        "weight_advantage": _over(part_B, row_weight_B * prepared.advantage_B),
        "groups_dropped": prepared.dropped_share_B.sum(),
        "groups_zero_variance": prepared.flat_share_B.sum(),
        "excluded_learner_nonfinite": (prepared.mask_BT.any(1) & ~part_B).sum(),
    }
    for reason in Exclusion:
        if reason is not Exclusion.NONE:
            sums[f"excluded_{reason.name.lower()}"] = (prepared.reason_B == reason).sum()
    for estimator in KlEstimator:
        kl_BT = kl_terms(rows.log_p_BT, rows.log_q_BT, estimator)
        sums[f"kl_{estimator}"] = _over(rows.mask_BT, kl_BT)
    if entropy_BT is not None:
        sums["entropy"] = _over(rows.mask_BT, entropy_BT.double())
    if prepared.staleness_B is not None:
        sums["staleness"] = _over(part_B, prepared.staleness_B)
    return PartialMetrics(
        sums={name: value.double() for name, value in sums.items()},
        weights=terms.weight[rows.mask_BT if token_weights else part_B].double(),
    )


def finish_metrics(partials: Sequence[PartialMetrics]) -> dict[str, float]:
    """The step's metrics from all its micro-batches and ranks. Names and meanings: docs/gepo.md.

    Means over nothing are 0. One transfer from the device, however many the micro-batches.
    """
    if not partials:
        raise ValueError("no micro-batch was evaluated")
    names = list(partials[0].sums)
    device = partials[0].weights.device
    table = torch.stack([torch.stack([p.sums[name].to(device) for name in names]) for p in partials])
    total = dict(zip(names, table.sum(0).tolist(), strict=True))
    rows, tokens = max(total["rows"], 1.0), max(total["tokens"], 1.0)
    advantage = total["advantage"] / rows
    result = {
        "loss": total["loss"],
        "rows": total["rows"],
        "tokens": total["tokens"],
        "clip_share": total["cut"] / max(total["cut_terms"], 1.0),
        "e_over_mean_q": total["e_over_mean_q"] / rows,
        "advantage_mean": advantage,
        "advantage_std": max(total["advantage_square"] / rows - advantage**2, 0.0) ** 0.5,
        "bias_estimate": _bias(total, rows),
        "groups_dropped": round(total["groups_dropped"], 6),
        "groups_zero_variance": round(total["groups_zero_variance"], 6),
    }
    result |= {name: value for name, value in total.items() if name.startswith("excluded_")}
    result |= {name: value / tokens for name, value in total.items() if name in ("kl_k1", "kl_k2", "kl_k3", "entropy")}
    if "staleness" in total:
        result["staleness_mean"] = total["staleness"] / rows
    return result | weight_statistics(torch.cat([p.weights.to(device) for p in partials]))


def weight_statistics(weights: Tensor) -> dict[str, float]:
    """Mean, variance (n), extremes, quantiles, effective sample size (Σw)²/Σw² and its share of n; weights [n]."""
    if weights.numel() == 0:
        return dict.fromkeys(
            ("weight_mean", "weight_var", "weight_min", "weight_max", "weight_ess", "weight_ess_share"), 0.0
        ) | {f"weight_{name}": 0.0 for name in QUANTILES}
    ordered = weights.sort().values
    square = ordered.square().sum()
    ess = torch.where(square > 0.0, ordered.sum().square() / square.clamp(min=1e-300), 0.0)
    values = {
        "weight_mean": ordered.mean(),
        "weight_var": ordered.var(unbiased=False),
        "weight_min": ordered[0],
        "weight_max": ordered[-1],
        "weight_ess": ess,
        "weight_ess_share": ess / ordered.numel(),
    }
    # Nearest rank: torch.quantile refuses more than 16 million values.
    last = ordered.numel() - 1
    values |= {f"weight_{name}": ordered[round(share * last)] for name, share in QUANTILES.items()}
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def _bias(total: dict[str, float], rows: float) -> float:
    """E_p[A] - E_q[w A]: the first self-normalised over exp(s_p - s_q), the second with the loss's weight."""
    if total["ratio"] <= 0.0:
        return 0.0
    return total["ratio_advantage"] / total["ratio"] - total["weight_advantage"] / rows


def _over(keep: Tensor, values: Tensor) -> Tensor:
    return torch.where(keep, values, 0.0).sum()

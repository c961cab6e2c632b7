"""An independent float64 oracle: every loss by scalar loops over rows and tokens, with gradients derived by hand.

It shares no code with services/learner/losses, and keeps its own table of the defaults of design and papers.
"""

import math
from dataclasses import dataclass, field

import numpy as np

CAP = 80.0
# name: (kind, clip low, clip high, aggregation, advantage)
DEFAULTS: dict[str, tuple[str, float, float, str, str]] = {
    "gepo": ("row", 0.2, 0.2, "seq_mean", "mean"),
    "gepo_plus": ("row", 0.2, 0.2, "seq_mean", "mean"),
    "gepo_fresh": ("row", 0.2, 0.2, "seq_mean", "mean_std"),
    "gspo": ("row", 3e-4, 4e-4, "seq_mean", "mean_std"),
    "gspo_token": ("token", 3e-4, 4e-4, "seq_mean", "mean_std"),
    "defensive": ("row", 0.2, 0.2, "seq_mean", "mean"),
    "gmpo": ("row", 0.4, 0.4, "seq_mean", "mean_std"),
    "grpo": ("token", 0.2, 0.2, "seq_mean", "mean_std"),
    "dr_grpo": ("token", 0.2, 0.2, "dr_grpo", "mean"),
    "bnpo": ("token", 0.2, 0.2, "token_mean", "bnpo"),
    "cispo": ("token", 0.2, 0.2, "token_mean", "mean_std"),
    "topr": ("token", 0.2, 0.2, "token_mean", "mean"),
    "tis": ("token", 0.2, 0.2, "seq_mean", "mean_std"),
    "icepop": ("token", 0.2, 0.2, "seq_mean", "mean_std"),
    "seq_mask": ("token", 0.2, 0.2, "seq_mean", "mean_std"),
    "decoupled_ppo": ("token", 0.2, 0.2, "seq_mean", "mean_std"),
}
CAPS = {"tis": 2.0, "icepop": 5.0, "seq_mask": 2.0}


@dataclass(kw_only=True)
class Case:
    """`logp`, `logq`, `prox` and `ref` are ragged: one list per row, already without padding."""

    loss: str
    logp: list[list[float]]
    logq: list[list[float]]
    rewards: list[float]
    groups: list[int]
    prox: list[list[float]] | None = None
    ref: list[list[float]] | None = None
    overlong: list[bool] | None = None
    staleness: list[int] | None = None
    options: dict[str, object] = field(default_factory=dict)

    def option(self, name: str, default: object) -> object:
        value = self.options.get(name)
        return default if value is None else value


@dataclass(kw_only=True)
class Answer:
    loss: float
    gradient: list[list[float]]
    weights: list[float | list[float] | None]
    advantages: list[float]
    taking_part: list[bool]
    log_e: list[float | None]


def exp(x: float) -> float:
    return math.exp(min(x, CAP))


def lse(xs: list[float]) -> float:
    top = max(xs)
    return top + math.log(math.fsum(math.exp(x - top) for x in xs))


def evaluate(case: Case) -> Answer:
    """Loss, d loss / d log p, weights before clipping, advantages, and log E of each row's group."""
    kind, *_ = DEFAULTS[case.loss]
    count = len(case.logp)
    sound = [len(q) > 0 and all(map(math.isfinite, q)) for q in case.logq]
    overlong = case.overlong or [False] * count
    part = [sound[i] and not (overlong[i] and case.option("mask_overlong", True)) for i in range(count)]
    adv = advantages(case)
    if case.option("zero_variance", "keep") == "drop":
        part = [
            part[i] and len({r for r, g in zip(case.rewards, case.groups, strict=True) if g == case.groups[i]}) > 1
            for i in range(count)
        ]
    log_e = [expectation(case, sound, i) for i in range(count)]
    lengths = [len(case.logp[i]) if part[i] else 0 for i in range(count)]
    coefficient = coefficients(case, lengths)
    total, gradient, weights = 0.0, [], []
    for i in range(count):
        p = case.logp[i]
        if not part[i]:
            gradient.append([0.0] * len(p))
            weights.append(None)
            continue
        c = coefficient[i]
        if kind == "row":
            value, slopes, weight = row_term(case, i, adv[i], log_e[i], largest(case, sound, i))
            total -= c * len(p) * value
            row = [-c * len(p) * s for s in slopes]
        else:
            value, slopes, weight = token_terms(case, i, adv[i])
            total -= c * math.fsum(value)
            row = [-c * s for s in slopes]
        beta = float(case.option("kl_beta", 0.0))
        if beta:
            target = case.ref[i] if case.option("kl_target", "sampler") == "reference" else case.logq[i]
            for t, (lp, lt) in enumerate(zip(p, target, strict=True)):
                value, slope = kl(str(case.option("kl_estimator", "k2")), lt - lp)
                total += beta * c * value
                row[t] += beta * c * slope
        gradient.append(row)
        weights.append(weight)
    return Answer(loss=total, gradient=gradient, weights=weights, advantages=adv, taking_part=part, log_e=log_e)


def kl(estimator: str, d: float) -> tuple[float, float]:
    """Value, and slope in log p (d = log target - log p, so the sign turns)."""
    if estimator == "k1":
        return -d, 1.0
    if estimator == "k2":
        return d * d / 2.0, -d
    return exp(d) - d - 1.0, (1.0 - exp(d)) if d <= CAP else 1.0


def seq(case: Case, logs: list[float], default: str = "mean") -> float:
    total = math.fsum(logs)
    return total if case.option("sequence_logprob", default) == "sum" else total / len(logs)


def dseq(case: Case, length: int, default: str = "mean") -> float:
    return 1.0 if case.option("sequence_logprob", default) == "sum" else 1.0 / length


def expectation(case: Case, sound: list[bool], i: int) -> float | None:
    s = [seq(case, case.logq[j]) for j in range(len(sound)) if sound[j] and case.groups[j] == case.groups[i]]
    return lse([2.0 * x for x in s]) - lse(s) if s else None


def largest(case: Case, sound: list[bool], i: int) -> float:
    return max(seq(case, case.logq[j]) for j in range(len(sound)) if sound[j] and case.groups[j] == case.groups[i])


def clip(case: Case) -> tuple[float, float]:
    _, low, high, _, _ = DEFAULTS[case.loss]
    return float(case.option("clip_low", low)), float(case.option("clip_high", high))


def ppo(case: Case, log_w: float, a: float) -> tuple[float, float]:
    """min(wA, clip(w)A) and its slope in log w."""
    low, high = clip(case)
    w = exp(log_w)
    clipped = min(max(w, 1.0 - low), 1.0 + high)
    if w * a <= clipped * a:
        return w * a, (w * a if log_w <= CAP else 0.0)
    return clipped * a, 0.0


def row_term(case: Case, i: int, a: float, log_e: float | None, log_max: float) -> tuple[float, list[float], float]:
    p, q = case.logp[i], case.logq[i]
    n = len(p)
    sp, sq = seq(case, p), seq(case, q)
    if case.loss == "gmpo":
        low, high = clip(case)
        kept, bounded = [], []
        for lp, lq in zip(p, q, strict=True):
            d = lp - lq
            b = min(d, high) if a > 0 else max(d, -low) if a < 0 else d
            bounded.append(b)
            kept.append(1.0 if b == d else 0.0)
        mean = math.fsum(bounded) / n
        g = exp(mean)
        slope = g * a / n if mean <= CAP else 0.0
        return g * a, [slope * k for k in kept], exp(math.fsum(lp - lq for lp, lq in zip(p, q, strict=True)) / n)
    if case.loss == "defensive":
        eta = float(case.option("eta", 0.005))
        denominator = lse([math.log(1.0 - eta) + sq, math.log(eta) + sp])
    elif case.loss == "gepo":
        denominator = log_e
    elif case.loss == "gepo_fresh":
        tau0 = float(case.option("fresh_versions", 4.0))
        own = 0.0 if case.staleness is None or tau0 == 0.0 else math.exp(-((case.staleness[i] / tau0) ** 2))
        denominator = own * sq + (1.0 - own) * log_max
    elif case.loss == "gepo_plus":
        k3 = math.fsum(exp(lq - lp) - (lq - lp) - 1.0 for lp, lq in zip(p, q, strict=True)) / n
        denominator = sq if k3 < float(case.option("gepo_plus_kl", 0.002)) else log_e
    else:
        denominator = sq
    value, slope = ppo(case, sp - denominator, a)
    return value, [slope * dseq(case, n)] * n, exp(sp - denominator)


def token_terms(case: Case, i: int, a: float) -> tuple[list[float], list[float], float | list[float]]:
    p, q = case.logp[i], case.logq[i]
    values, slopes = [], []
    ratios = [exp(lp - lq) for lp, lq in zip(p, q, strict=True)]
    if case.loss in ("grpo", "dr_grpo", "bnpo"):
        pairs = [ppo(case, lp - lq, a) for lp, lq in zip(p, q, strict=True)]
        return [v for v, _ in pairs], [s for _, s in pairs], ratios
    if case.loss == "gspo_token":
        log_s = seq(case, p) - seq(case, q)
        value, slope = ppo(case, log_s, a)
        return [value] * len(p), [slope] * len(p), exp(log_s)
    if case.loss == "cispo":
        top = 1.0 + clip(case)[1]
        return (
            [min(r, top) * a * lp for r, lp in zip(ratios, p, strict=True)],
            [min(r, top) * a for r in ratios],
            ratios,
        )
    if case.loss == "topr":
        raw = exp(seq(case, p, "sum") - seq(case, q, "sum"))
        w = min(raw, 1.0) if a < 0 else 1.0
        return [w * a * lp for lp in p], [w * a] * len(p), raw
    prox = case.prox[i] if case.prox else p
    cap = float(case.option("weight_cap", CAPS.get(case.loss, math.inf)))
    rho_row = exp(seq(case, prox) - seq(case, q))
    for lp, lq, lx in zip(p, q, prox, strict=True):
        value, slope = ppo(case, lp - lx, a)
        rho = exp(lx - lq)
        if case.loss == "tis":
            rho = min(rho, cap)
        elif case.loss == "icepop":
            rho = rho if float(case.option("weight_floor", 0.5)) <= rho <= cap else 0.0
        elif case.loss == "seq_mask":
            rho = rho_row if rho_row <= cap else 0.0
        values.append(rho * value)
        slopes.append(rho * slope)
    return values, slopes, ratios


def advantages(case: Case) -> list[float]:
    rule = str(case.option("advantage", DEFAULTS[case.loss][4]))
    rewards, groups = case.rewards, case.groups
    means = {g: float(np.mean([r for r, h in zip(rewards, groups, strict=True) if h == g])) for g in set(groups)}
    result = []
    for r, g in zip(rewards, groups, strict=True):
        own = [x for x, h in zip(rewards, groups, strict=True) if h == g]
        centred = 0.0 if len(set(own)) == 1 else r - means[g]
        if rule == "mean_std":
            centred /= float(np.std(own, ddof=1)) + float(case.option("advantage_epsilon", 1e-4))
        elif rule == "bnpo":
            centred *= inverse_density(means[g], list(means.values()), str(case.option("bnpo_shape", "sum_third")))
        result.append(centred)
    return result


def inverse_density(p: float, all_p: list[float], shape: str) -> float:
    alpha = beta = 1.0
    variance = float(np.var(all_p, ddof=1)) if len(all_p) > 1 else 0.0
    if variance > 0:
        m = float(np.mean(all_p))
        k = max(m * (1 - m) / variance - 1.0, 0.0)
        a, b = k * m, k * (1 - m)
        alpha, beta = ((1 + a) / 3, (1 + b) / 3) if shape == "sum_third" else (1 + a / 3, 1 + b / 3)
    p = min(max(p, 1e-12), 1 - 1e-12)
    log_norm = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    log_density = (alpha - 1) * math.log(p) + (beta - 1) * math.log(1 - p) + log_norm
    return min(math.exp(-log_density), 1e6)


def coefficients(case: Case, lengths: list[int]) -> list[float]:
    rule = str(case.option("aggregation", DEFAULTS[case.loss][3]))
    rows = sum(n > 0 for n in lengths)
    longest = float(case.option("max_completion_tokens", max(lengths, default=1)))
    alpha = float(case.option("delta_l_alpha", 1.0))
    shares = math.fsum(n**-alpha for n in lengths if n)
    result = []
    for n in lengths:
        if n == 0:
            result.append(0.0)
        elif rule == "seq_mean":
            result.append(1.0 / rows / n)
        elif rule == "token_mean":
            result.append(1.0 / sum(lengths))
        elif rule == "dr_grpo":
            result.append(1.0 / rows / longest)
        else:
            result.append(n**-alpha / shares / longest)
    return result

"""Per-token estimators of KL(learner ‖ target) from the learner's and the target's log-probs of the drawn tokens."""

from torch import Tensor

from services.learner.losses.settings import KlEstimator

MAX_LOG_RATIO = 80.0
"""Bound of k3's exponent; exp(80) still fits float32."""


def kl_terms(log_p: Tensor, log_target: Tensor, estimator: KlEstimator) -> Tensor:
    """With d = log target - log p, same shape as the inputs; gradient through log p:

    k1 = -d                unbiased on policy, but its gradient has mean 0: no regulariser, a metric
    k2 = d² / 2            its gradient is that of KL(p ‖ target) on policy; grows with the square of the gap
    k3 = exp(d) - d - 1    positive and unbiased on policy; its gradient is bounded above and explodes below
    """
    d = log_target - log_p
    if estimator is KlEstimator.K1:
        return -d
    if estimator is KlEstimator.K2:
        return 0.5 * d.square()
    return d.clamp(max=MAX_LOG_RATIO).expm1() - d  # exp(d) - 1 - d, by rounding never below 0

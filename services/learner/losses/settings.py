"""The `[loss]` section: which loss, and its numbers. Imports no torch, so that configuration loads fast."""

from difflib import get_close_matches
from enum import StrEnum

from pydantic import Field, field_validator, model_validator

from services.runtime.config import Section


class LossName(StrEnum):
    """Every loss of the family; `table.py` has a row for each."""

    GEPO = "gepo"
    GEPO_PLUS = "gepo_plus"
    GEPO_FRESH = "gepo_fresh"
    GSPO = "gspo"
    GSPO_TOKEN = "gspo_token"
    DEFENSIVE = "defensive"
    GMPO = "gmpo"
    GRPO = "grpo"
    DR_GRPO = "dr_grpo"
    BNPO = "bnpo"
    CISPO = "cispo"
    TOPR = "topr"
    TIS = "tis"
    ICEPOP = "icepop"
    SEQ_MASK = "seq_mask"
    DECOUPLED_PPO = "decoupled_ppo"


class Aggregation(StrEnum):
    """How terms become one number; formulas in `aggregate.py`."""

    SEQ_MEAN = "seq_mean"
    TOKEN_MEAN = "token_mean"
    DR_GRPO = "dr_grpo"
    DELTA_L = "delta_l"


class Advantage(StrEnum):
    """How rewards become advantages; formulas in `advantages.py`."""

    MEAN = "mean"
    MEAN_STD = "mean_std"
    BNPO = "bnpo"


class BetaShape(StrEnum):
    """Parameters of BNPO's normalising density, from the fitted Beta(a, b) of the group means."""

    SUM_THIRD = "sum_third"
    ONE_PLUS_THIRD = "one_plus_third"


class KlEstimator(StrEnum):
    """Per-token estimators of KL(learner ‖ target); formulas in `kl.py`."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class KlTarget(StrEnum):
    SAMPLER = "sampler"
    REFERENCE = "reference"


class SequenceLogprob(StrEnum):
    """A sequence's log-prob: mean over its tokens (length-normalised), or their sum (the probability itself)."""

    MEAN = "mean"
    SUM = "sum"


class ZeroVariance(StrEnum):
    """What a group whose rewards are all equal does: its advantage is 0 either way."""

    KEEP = "keep"
    DROP = "drop"


ICEPOP_FLOOR, ICEPOP_CAP = 0.5, 5.0
"""Bounds of icepop's weights where they are unset."""


class LossSettings(Section):
    """The loss. A key that is unset takes the default of the loss that `name` picks (docs/gepo.md has the table)."""

    name: LossName = LossName.GEPO
    """gepo, gepo_plus, gepo_fresh, gspo, gspo_token, defensive, gmpo, grpo, dr_grpo, bnpo, cispo, topr, tis, icepop,
    seq_mask or decoupled_ppo."""
    clip_low: float | None = Field(default=None, ge=0.0)
    """Weights below 1 - clip_low stop pushing down (gmpo: log-ratios below -clip_low). Unset: the loss's own."""
    clip_high: float | None = Field(default=None, ge=0.0)
    """Weights above 1 + clip_high stop pushing up (gmpo: log-ratios above +clip_high; cispo: the weight's cap).
    Unset: the loss's own."""
    aggregation: Aggregation | None = None
    """seq_mean, token_mean, dr_grpo or delta_l. Unset: the loss's own."""
    advantage: Advantage | None = None
    """mean, mean_std or bnpo. Unset: the loss's own."""
    advantage_epsilon: float = Field(default=1e-4, ge=0.0)
    """Added to the standard deviation that mean_std divides by, in units of reward."""
    bnpo_shape: BetaShape = BetaShape.SUM_THIRD
    """Beta parameters of the bnpo advantage: sum_third is (1+a)/3, (1+b)/3; one_plus_third, as in the authors' code,
    is 1+a/3, 1+b/3."""
    zero_variance: ZeroVariance = ZeroVariance.KEEP
    """Groups whose rewards are all equal: keep counts their rows in the normaliser, drop leaves them out (KL too)."""
    mask_overlong: bool = True
    """Leave completions that were cut at the token limit out of the loss; their rewards still count in the baseline."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Constant length in tokens that dr_grpo and delta_l divide by. Unset: the longest completion of the batch."""
    delta_l_alpha: float = Field(default=1.0, ge=0.0)
    """Exponent of delta_l: 1 has the least variance, .75 keeps more of long completions, 0 is dr_grpo."""
    sequence_logprob: SequenceLogprob | None = None
    """mean (length-normalised) or sum (the paper's raw probability) for sequence weights. Unset: the loss's own."""
    eta: float = Field(default=0.005, gt=0.0, lt=1.0)
    """defensive: share of the learner's own policy in the denominator; weights stay below 1/eta."""
    gepo_plus_kl: float = Field(default=0.002, ge=0.0)
    """gepo_plus: a sequence whose mean k3 KL (nats per token) is below this divides by its own q, not by E."""
    fresh_versions: float = Field(default=4.0, ge=0.0)
    """gepo_fresh: staleness in versions around which the denominator goes from q_i to max_j q_j; 0 is max_j q_j at
    once."""
    weight_cap: float | None = Field(default=None, gt=0.0)
    """Upper bound C of the importance weight of tis, icepop and seq_mask. Unset: 2, 5 and 2."""
    weight_floor: float | None = Field(default=None, ge=0.0)
    """Lower bound of the importance weight of icepop. Unset: 0.5."""
    kl_beta: float = Field(default=0.0, ge=0.0)
    """Weight of the KL regulariser; 0 turns it off (the paper used .005 in its hetero runs)."""
    kl_estimator: KlEstimator = KlEstimator.K2
    """k1, k2 or k3. k3 grows exponentially with staleness and can wreck a run."""
    kl_target: KlTarget = KlTarget.SAMPLER
    """Policy that the regulariser pulls to: the sampler's (needs no extra model), or reference, a frozen copy of the
    policy that the run began with (a second model in memory, one more forward pass per row)."""

    @property
    def wants_reference(self) -> bool:
        """Whether a batch needs the reference model's log-probs."""
        return self.kl_beta > 0.0 and self.kl_target is KlTarget.REFERENCE

    @property
    def wants_shares(self) -> bool:
        """Whether rewards must lie between 0 and 1."""
        return (self.advantage or (Advantage.BNPO if self.name is LossName.BNPO else None)) is Advantage.BNPO

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "LossSettings":
        floor = ICEPOP_FLOOR if self.weight_floor is None else self.weight_floor
        cap = self.weight_cap or ICEPOP_CAP
        if self.name is LossName.ICEPOP and floor >= cap:
            raise ValueError(f"weight_floor = {floor:g} is not below weight_cap = {cap:g}: icepop would use no token")
        return self

    @field_validator("name", mode="before")
    @classmethod
    def _known_loss(cls, value: object) -> object:
        names = [name.value for name in LossName]
        if isinstance(value, str) and value not in names:
            near = get_close_matches(value, names, n=3, cutoff=0.4) or names
            raise ValueError(
                f"unknown loss {value!r}: nearest {'name is' if len(near) == 1 else 'names are'} {', '.join(near)}"
            )
        return value

"""One row per loss: its function and the defaults of the keys that are left unset."""

from collections.abc import Callable
from dataclasses import dataclass

from services.learner.losses import sequence_losses, token_losses
from services.learner.losses.prepared import Dials
from services.learner.losses.ratio import Rows, Terms
from services.learner.losses.settings import (
    ICEPOP_CAP,
    ICEPOP_FLOOR,
    Advantage,
    Aggregation,
    LossName,
    LossSettings,
    SequenceLogprob,
)

LossFunction = Callable[[Rows], Terms]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRow:
    function: LossFunction
    clip: tuple[float, float] = (0.2, 0.2)
    aggregation: Aggregation = Aggregation.SEQ_MEAN
    advantage: Advantage = Advantage.MEAN_STD
    sequence_logprob: SequenceLogprob = SequenceLogprob.MEAN
    weight_cap: float = 2.0
    weight_floor: float = 0.0


LOSSES: dict[LossName, LossRow] = {
    LossName.GEPO: LossRow(function=sequence_losses.gepo, advantage=Advantage.MEAN),
    LossName.GEPO_PLUS: LossRow(function=sequence_losses.gepo_plus, advantage=Advantage.MEAN),
    LossName.GEPO_FRESH: LossRow(function=sequence_losses.gepo_fresh),
    LossName.GSPO: LossRow(function=sequence_losses.gspo, clip=(3e-4, 4e-4)),
    LossName.GSPO_TOKEN: LossRow(function=token_losses.gspo_token, clip=(3e-4, 4e-4)),
    LossName.DEFENSIVE: LossRow(function=sequence_losses.defensive, advantage=Advantage.MEAN),
    LossName.GMPO: LossRow(function=sequence_losses.gmpo, clip=(0.4, 0.4)),
    LossName.GRPO: LossRow(function=token_losses.grpo),
    LossName.DR_GRPO: LossRow(function=token_losses.grpo, aggregation=Aggregation.DR_GRPO, advantage=Advantage.MEAN),
    LossName.BNPO: LossRow(function=token_losses.grpo, aggregation=Aggregation.TOKEN_MEAN, advantage=Advantage.BNPO),
    LossName.CISPO: LossRow(function=token_losses.cispo, aggregation=Aggregation.TOKEN_MEAN),
    LossName.TOPR: LossRow(
        function=token_losses.topr,
        aggregation=Aggregation.TOKEN_MEAN,
        advantage=Advantage.MEAN,
        sequence_logprob=SequenceLogprob.SUM,
    ),
    LossName.TIS: LossRow(function=token_losses.tis),
    LossName.ICEPOP: LossRow(function=token_losses.icepop, weight_cap=ICEPOP_CAP, weight_floor=ICEPOP_FLOOR),
    LossName.SEQ_MASK: LossRow(function=token_losses.seq_mask),
    LossName.DECOUPLED_PPO: LossRow(function=token_losses.decoupled_ppo),
}


def dials_of(settings: LossSettings) -> Dials:
    """Fills what the settings leave unset from the loss's row."""
    row = LOSSES[settings.name]
    return Dials(
        name=settings.name,
        clip_low=row.clip[0] if settings.clip_low is None else settings.clip_low,
        clip_high=row.clip[1] if settings.clip_high is None else settings.clip_high,
        aggregation=settings.aggregation or row.aggregation,
        advantage=settings.advantage or row.advantage,
        sequence_logprob=settings.sequence_logprob or row.sequence_logprob,
        weight_cap=settings.weight_cap or row.weight_cap,
        weight_floor=row.weight_floor if settings.weight_floor is None else settings.weight_floor,
        settings=settings,
    )

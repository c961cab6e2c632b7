"""One row per loss: its function and the defaults of the keys that are left unset."""

from collections.abc import Callable
from dataclasses import dataclass

from services.learner.losses import sequence_losses, token_losses
from services.learner.losses.prepared import Dials
from services.learner.losses.ratio import Rows, Terms
from services.learner.losses.settings import Advantage, Aggregation, LossName, LossSettings, SequenceLogprob

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
    LossName.GSPO: LossRow(function=sequence_losses.gspo, clip=(3e-4, 4e-4)),
    LossName.GRPO: LossRow(function=token_losses.grpo),
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

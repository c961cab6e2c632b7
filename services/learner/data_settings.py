"""What the data side needs of the learner's configuration."""

from dataclasses import dataclass

from services.learner.admission import FormRules
from services.learner.config import LearnerConfig
from services.learner.leases import LeaseRules
from services.learner.pacing import PacingRules


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Rules of every part, and what is not a rule of one part alone."""

    run_id: str
    seed: int
    shuffle: bool
    form: FormRules
    pacing: PacingRules
    leases: LeaseRules
    session_ttl_s: float
    max_age_s: float

    @classmethod
    def of(cls, config: LearnerConfig, vocab_size: int) -> "DataSettings":
        """`vocab_size` is the model's: a token id at or above it is invalid."""
        return cls(
            run_id=config.run.id,
            seed=config.run.seed,
            shuffle=config.data.shuffle,
            form=FormRules(
                vocab_size=vocab_size,
                max_prompt_tokens=config.data.max_prompt_tokens,
                max_completion_tokens=config.sampling.max_completion_tokens,
                max_eval_tokens=config.sampling.max_completion_tokens,
                temperature=config.sampling.temperature,
                eval_temperature=config.eval.temperature,
            ),
            pacing=PacingRules(
                groups_per_step=config.batch.groups_per_step,
                max_staleness=config.staleness.max_staleness,
                ahead=config.lease.ahead,
            ),
            leases=LeaseRules(
                run_seed=config.run.seed,
                group_size=config.sampling.group_size,
                ttl_s=config.lease.ttl_s,
                grace_s=config.lease.heartbeat_s,
            ),
            session_ttl_s=config.lease.session_ttl_s,
            max_age_s=config.staleness.max_age_s,
        )

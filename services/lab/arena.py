"""What one run of the laboratory is: everything that a cell of an experiment depends on, as typed settings."""

import hashlib
import re
from typing import Annotated

from pydantic import Field, field_validator

from services.lab.contestants import PolicyName
from services.lab.sum_tasks import SumTask, TaskName
from services.learner.config import OptimizerSection
from services.learner.losses.settings import LossSettings
from services.runtime.config import Section
from services.sampler.delays import DelaySection


class Arena(Section):
    """What the cells of one experiment share."""

    task: TaskName = TaskName.FIXED
    """fixed, variable or worked."""
    columns: int = Field(default=5, ge=1, le=12)
    """Most digits of a number."""
    policy: PolicyName = PolicyName.COLUMNS
    """columns, small or large."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d{1,3})?)$")
    """"cpu", "cuda" or "cuda:N"."""
    warm_up: float = Field(default=0.22, gt=0, lt=1)
    """Accuracy at which supervision ends and reinforcement learning begins; worked: chance of the full working."""
    warm_up_lr: float = Field(default=1e-2, gt=0)
    """Learning rate of the supervision."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Groups per optimizer step, P."""
    group_size: int = Field(default=8, ge=2)
    """Completions per prompt, G."""
    steps: int = Field(default=600, ge=1)
    """Optimizer steps."""
    eval_every: int = Field(default=20, ge=1)
    """Steps between measurements of the accuracy."""
    eval_problems: int = Field(default=1024, ge=1)
    """Problems that accuracy is measured on, fresh from the task's distribution."""
    micro_batch_tokens: int = Field(default=1 << 16, ge=1)
    """As [batch] micro_batch_tokens."""
    step_s: float = Field(default=30.0, gt=0)
    """Virtual time of an optimizer step, in seconds."""
    samplers: int = Field(default=4, ge=1)
    """Samplers, where delays are in seconds."""
    speeds: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1.0,), min_length=1)
    """Relative speed of each sampler, over again where there are more samplers. At 1 all together make `supply` groups
    in the time in which the learner trains one."""
    supply: float = Field(default=1.25, gt=0)
    """Groups made per group trained, while nobody waits."""
    max_staleness: int = Field(default=64, ge=0)
    """As [staleness] max_staleness, where delays are in seconds."""
    ahead: float = Field(default=0.5, ge=0)
    """As [lease] ahead, where delays are in seconds."""

    @field_validator("speeds", mode="before")
    @classmethod
    def _from_words(cls, value: object) -> object:
        """From the command line: numbers between commas."""
        return value.split(",") if isinstance(value, str) else value

    @property
    def sums(self) -> SumTask:
        return SumTask(name=self.task, columns=self.columns)


class Cell(Section):
    """One run: one loss, learning rate, delay and seed. Equal cells give equal results."""

    arena: Arena = Arena()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSection = OptimizerSection(lr=5e-3)
    lag_versions: int | None = 0
    """Samplers always generate with the policy of so many versions ago; None takes `delay` instead."""
    delay: DelaySection = DelaySection()
    """Delays in virtual seconds, where lag_versions is unset."""
    delay_name: str = "0"
    """How tables call the delay."""
    seed: int = Field(default=0, ge=0)
    """Of warm-up, problems, draws and delays."""

    @property
    def max_staleness(self) -> int:
        return self.arena.max_staleness if self.lag_versions is None else self.lag_versions

    @property
    def key(self) -> str:
        """Its file name without suffix: what a person looks for, and a digest of all that it depends on. Keys at their
        default are left out of the digest, so that a new key of a later release keeps old results."""
        digest = hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:10]
        words = (self.arena.task, self.loss.name, f"{self.optimizer.lr:g}", self.delay_name, f"s{self.seed}", digest)
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(words))

    @property
    def base_key(self) -> str:
        """Names the warmed-up policy that it starts from."""
        arena = self.arena
        parts = (arena.task, arena.columns, arena.policy, arena.warm_up, arena.warm_up_lr, self.seed)
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
        return f"base-{arena.task}-{arena.policy}-s{self.seed}-{digest}"

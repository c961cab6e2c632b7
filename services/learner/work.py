"""One group that the run wants, and who is at work on it."""

import hashlib
import re
from dataclasses import dataclass, field

from services.wire.types import LeasePurpose, Prompt

GRANT_BYTES = 3 << 20
"""Prompts of one answer to LeasePrompts: with what stands around them they fit a message of 4 MiB."""
_LEASE_ID = re.compile(r"([1-9]\d{0,9})-(t\d{1,18}|e\d{1,9}\.\d{1,9})-(\d{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseName:
    """A lease id taken apart: "3-t17-1" is the first grant of training prompt 17 by the learner of epoch 3."""

    learner_epoch: int
    key: str
    grant: int

    @classmethod
    def parse(cls, lease_id: str) -> "LeaseName | None":
        match = _LEASE_ID.fullmatch(lease_id)
        return cls(learner_epoch=int(match[1]), key=match[2], grant=int(match[3])) if match else None

    def __str__(self) -> str:
        return f"{self.learner_epoch}-{self.key}-{self.grant}"

    @property
    def number(self) -> int | None:
        """The training prompt's number; None for evaluation."""
        return int(self.key[1:]) if self.key[0] == "t" else None

    @property
    def eval_round(self) -> int | None:
        return int(self.key[1:].split(".")[0]) if self.key[0] == "e" else None


@dataclass(slots=True, kw_only=True)
class Holder:
    """A lease that is out."""

    lease: LeaseName
    sampler_id: str
    session_epoch: int
    granted_at: float
    deadline: float
    min_policy_version: int


@dataclass(slots=True, kw_only=True)
class Work:
    """A prompt to be answered with one group. It stays until a group is accepted or it is given up."""

    key: str
    """"t17": training prompt number 17. "e2.5": prompt 5 of evaluation round 2."""
    prompt: Prompt
    purpose: LeasePurpose
    group_size: int
    number: int = -1
    """Number in the order of training prompts; -1 for evaluation."""
    eval_round: int = 0
    eval_index: int = -1
    min_eval_version: int = 0
    """Evaluation: oldest policy that may answer."""
    grants: int = 0
    granted_to: dict[int, str] = field(default_factory=dict[int, str])
    reopened: bool = False
    """An accepted group of it was dropped: grants from before that are forgotten, and their groups may still come."""
    holder: Holder | None = None
    orphaned_until: float | None = None
    """After a restart of the learner: until then, whoever names it in a heartbeat has it."""

    @property
    def size_bytes(self) -> int:
        """Of its prompt in a message."""
        texts = (self.prompt.text, self.prompt.answer, self.prompt.metadata_json)
        return sum(len(text.encode()) for text in texts)

    @property
    def is_out(self) -> bool:
        return self.holder is not None or self.orphaned_until is not None


def seed_of(run_seed: int, key: str) -> int:
    """63 bits: the same prompt number draws alike in every run with this seed, whoever works on it."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{key}".encode()).digest()[:8]) >> 1

"""Counts over the whole run, restarts included: what status and summary.json show of groups.

The invariant, for groups of purpose TRAIN (an envelope that does not parse counts as one):
acknowledged = trained + sum(dropped by reason) + left in buffer.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


def length_bucket(tokens: int) -> int:
    """The power of two at or above a completion's length: key of the length histograms."""
    return 1 << max(0, tokens - 1).bit_length()


@dataclass(slots=True, kw_only=True)
class Tally:
    acknowledged: int = 0
    """Distinct TRAIN groups in the journal, whatever their verdict."""
    trained: int = 0
    duplicates: int = 0
    """Groups that came again with the same content, TRAIN and EVAL."""
    evaluated: int = 0
    """Distinct EVAL groups in the journal."""
    dropped: Counter[str] = field(default_factory=Counter[str])
    """TRAIN groups by reason: a verdict other than ACCEPTED, or what the buffer found."""
    staleness: Counter[int] = field(default_factory=Counter[int])
    """Groups trained, by versions between their policy and the learner's."""
    lengths_trained: Counter[int] = field(default_factory=Counter[int])
    """Completions of trained groups, by `length_bucket`; since this process started."""
    lengths_dropped: Counter[int] = field(default_factory=Counter[int])
    """The same for groups that the buffer dropped: must not lie above, or dropping biases training to short answers."""

    @property
    def buffered(self) -> int:
        """Groups that wait for a step (those in the step under way included)."""
        return self.acknowledged - self.trained - sum(self.dropped.values())

    def count_lengths(self, into: Counter[int], lengths: Iterable[int]) -> None:
        into.update(length_bucket(length) for length in lengths)

"""Which policy versions this run has published, by root digest: what admission compares groups with."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

_KEPT = 8192
"""Versions remembered below the newest; whatever is older is stale under any sensible bound."""


class Origin(Enum):
    """What a group's (version, root) is to this run."""

    PUBLISHED = 1
    FORGOTTEN = 2
    """Older than what is remembered: certainly stale."""
    FUTURE = 3
    """Above the newest version: the learner was restored from an older checkpoint."""
    ROLLED_BACK = 4
    """Published once, then undone by such a restore; a version of that number may exist again with other weights."""
    UNKNOWN_ROOT = 5
    """No such weights were ever published under that number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRow:
    version: int
    root: str
    retired: bool


class PublishedVersions:
    """`current` is -1 until the first version is out. Roots are lower-case hex digests."""

    def __init__(self, rows: Iterable[VersionRow] = ()) -> None:
        self._roots: dict[int, str] = {}
        self._retired: set[tuple[int, str]] = set()
        self.current = -1
        for row in sorted(rows, key=lambda row: row.version):
            if row.retired:
                self._retired.add((row.version, row.root))
            else:
                self.publish(row.version, row.root)

    @property
    def current_root(self) -> str:
        return self._roots.get(self.current, "")

    @property
    def _oldest(self) -> int:
        """Versions enter in ascending order, and a dict keeps it."""
        return next(iter(self._roots), 0)

    def publish(self, version: int, root: str) -> None:
        """Makes `version` current. Raises ValueError when it is older, or when other weights have its number."""
        if version < self.current or self._roots.get(version, root) != root:
            raise ValueError(f"version {version} cannot follow version {self.current}")
        self._roots[version] = root
        self._retired.discard((version, root))
        self.current = version
        while self._oldest < version - _KEPT:
            del self._roots[self._oldest]

    def roll_back(self, version: int) -> None:
        """Undoes every version above `version`."""
        for newer in [known for known in self._roots if known > version]:
            self._retired.add((newer, self._roots.pop(newer)))
        self.current = max(self._roots, default=-1)

    def origin(self, version: int, root: str) -> Origin:
        if self._roots.get(version) == root:
            return Origin.PUBLISHED
        if (version, root) in self._retired:
            return Origin.ROLLED_BACK
        if version > self.current:
            return Origin.FUTURE
        if version < self._oldest:
            return Origin.FORGOTTEN
        return Origin.UNKNOWN_ROOT

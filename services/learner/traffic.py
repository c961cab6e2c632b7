"""Weight bytes by receiver: what was sent, and what full weights would have cost. Paces receivers under a limit."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_REMEMBERED = 4096
"""Objects and versions that are remembered of a receiver; a keyframe of 100 GB has some 1,600 objects."""
_MOST_RECEIVERS = 1024
"""Receivers that are known by name; those that asked for nothing for longest are counted together under "", which is no
name: a cloud's hosts come and go under ever new ones."""


@dataclass(slots=True, kw_only=True)
class Receiver:
    """One sampler or relay, over all its connections."""

    bytes_sent: int = 0
    versions_fetched: int = 0
    bytes_full: int = 0
    planned: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Object -> (target version, full bytes) of the newest plans: one that is fetched may not be the last one."""
    counted: dict[int, None] = field(default_factory=dict[int, None])
    """Versions that were counted as fetched, oldest first."""
    free_at_s: float = 0.0
    """When the link's budget allows the next byte."""


class Traffic:
    """All receivers, by id. `clock` is monotonic seconds."""

    def __init__(self, max_mbit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s = max_mbit_s * 1e6 / 8
        self._clock = clock
        self._receivers: dict[str, Receiver] = {}

    def bytes_sent_to(self, name: str) -> int:
        """0 for one that is not known by name."""
        receiver = self._receivers.get(name)
        return 0 if receiver is None else receiver.bytes_sent

    def of(self, name: str) -> Receiver:
        """New where it is not known by name; from now on the one that asked last."""
        receiver = self._receivers[name] = self._receivers.pop(name, None) or Receiver()
        self._forget_idle()
        return receiver

    def _forget_idle(self) -> None:
        while len(self._receivers) > _MOST_RECEIVERS:
            name = next(name for name in self._receivers if name)
            others, gone = self._receivers.setdefault("", Receiver()), self._receivers.pop(name)
            others.bytes_sent += gone.bytes_sent
            others.versions_fetched += gone.versions_fetched
            others.bytes_full += gone.bytes_full

    def planned(self, name: str, version: int, object_ids: Iterable[str], full_bytes: int) -> None:
        """Notes what a receiver was told to fetch, to count a version when the first of it is fetched."""
        planned = self.of(name).planned
        for object_id in object_ids:
            planned.pop(object_id, None)  # to the end: what was planned longest ago is forgotten first
            planned[object_id] = (version, full_bytes)
        _forget_oldest(planned)

    def companions(self, object_ids: Collection[str]) -> set[str]:
        """All objects of the plans that some of these are fetched for: a receiver that takes one of them will ask for
        the others, hours later on a slow link."""
        found: set[str] = set()
        for receiver in self._receivers.values():
            planned = receiver.planned
            versions = {planned[object_id][0] for object_id in object_ids if object_id in planned}
            found.update(object_id for object_id, (version, _) in planned.items() if version in versions)
        return found

    def opened(self, name: str, object_id: str) -> bool:
        """Counts a version, once per plan's target, and says whether the object belongs to weights."""
        receiver = self.of(name)
        plan = receiver.planned.get(object_id)
        if plan is None:
            return False
        version, full_bytes = plan
        if version not in receiver.counted:
            receiver.counted[version] = None
            _forget_oldest(receiver.counted)
            receiver.versions_fetched += 1
            receiver.bytes_full += full_bytes
        return True

    async def pace(self, name: str, size_bytes: int) -> None:
        """*Waits for* the receiver's budget for `size_bytes` more; returns at once where there is no limit; *on cancel*
        these bytes are not counted."""
        if not self._bytes_per_s:
            return
        receiver = self.of(name)
        now, takes_s = self._clock(), size_bytes / self._bytes_per_s
        start = max(now, receiver.free_at_s)
        receiver.free_at_s = start + takes_s
        try:
            await asyncio.sleep(max(0.0, start - now))
        except asyncio.CancelledError:
            receiver.free_at_s -= takes_s
            raise

    @property
    def bytes_sent(self) -> int:
        return sum(receiver.bytes_sent for receiver in self._receivers.values())

    @property
    def bytes_full(self) -> int:
        return sum(receiver.bytes_full for receiver in self._receivers.values())

    def state(self) -> dict[str, list[int]]:
        """For the checkpoint: name -> [bytes sent, versions fetched, bytes full]."""
        return {name: [r.bytes_sent, r.versions_fetched, r.bytes_full] for name, r in self._receivers.items()}

    def restore(self, state: dict[str, list[int]]) -> None:
        for name, (sent, versions, full) in state.items():
            self._receivers[name] = Receiver(bytes_sent=sent, versions_fetched=versions, bytes_full=full)
        self._forget_idle()


def _forget_oldest(entries: dict[_Key, _Value]) -> None:
    while len(entries) > _REMEMBERED:
        del entries[next(iter(entries))]

"""The lease table: who works on which prompt, until when.

    new prompt ─grant─► out ─answer─► (journal, buffer) ─┐
        ▲                │ expiry, release                │ dropped: stale, invalid
        └── returned ◄───┴────────────────────────────────┘
            (granted again before new prompts, to anyone)

Prompts are numbered (`dataset.PromptOrder`). The journal knows the next number and which numbers were answered, so a
restarted learner grants neither twice: what was out becomes an orphan, which the sampler that still works on it takes
back by naming it in a heartbeat, and which expires otherwise. A late group of an expired lease is accepted while nobody
else has answered.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from services.learner.admission import LeaseFacts, Standing
from services.learner.dataset import PromptOrder
from services.learner.pacing import Pacing
from services.learner.work import GRANT_BYTES, Holder, LeaseName, Work, seed_of
from services.learner.work_list import WorkList
from services.runtime.backoff import set_within
from services.wire.types import Lease, LeasePurpose, Prompt

_MAX_HOLD = 10
"""Times the time-to-live that a lease can be renewed: a hung engine behind a live heartbeat must not stop the run."""
_VERSION_WAIT_S = 0.5
"""How long a call is held that needs newer weights first: they arrive at the sampler, and nothing here would tell."""

PROMPT_FAULTS = frozenset({"prompt_too_long", "bad_gold"})
"""Reasons of a release that lie in the prompt: no sampler could answer it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRules:
    run_seed: int
    group_size: int
    ttl_s: float
    grace_s: float
    """What a session's leases keep when a newer process of the same sampler registers: its spool may answer them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    leases: tuple[Lease, ...]
    reason: str = ""
    """Why there are none: "pacing" or "no_prompts"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the table asks of the rest of the learner."""

    waiting: Callable[[], int]
    """Groups in the buffer and in the step under way."""
    alive: Callable[[str, int], bool]
    """False for a (sampler, session epoch) that was lost."""
    samplers: Callable[[], int]
    """Samplers that are not lost."""
    record: Callable[[int, int], Awaitable[None]]
    """Makes (number of the next new prompt, lowest open number) durable."""
    given_up: Callable[[Work], None]
    """Nobody will be asked for this work again."""


class LeaseTable:
    def __init__(
        self,
        *,
        rules: LeaseRules,
        order: PromptOrder,
        pacing: Pacing,
        learner_epoch: int,
        clock: Callable[[], float],
        around: Surroundings,
    ) -> None:
        self._rules = rules
        self._pacing = pacing
        self._epoch = learner_epoch
        self._clock = clock
        self._around = around
        self._works = WorkList(order, rules.group_size, around.given_up)
        self._version = -1
        self._recorded = 0
        """Prompts below this number may be handed out: the journal knows of them."""
        self._changed = asyncio.Event()

    def restore(self, following: int, floor: int, answered: set[int], lost: set[int]) -> None:
        """After a restart: prompts in [floor, following) that no group answered may be at work for one ttl more; those
        whose groups are `lost` are granted again at once."""
        self._works.restore(following, floor, answered, lost, self._clock() + self._rules.ttl_s)
        self._recorded = following

    def advance(self, version: int) -> None:
        """A new version is out: there is room for more."""
        self._version = version
        self._pacing.advanced()
        self.wake()

    def wake(self) -> None:
        """Lets waiting calls look again, because room or prompts may have come."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, wait_s: float) -> None:
        """Until leases may be granted again that were not before, at most `wait_s`."""
        await set_within(self._changed, wait_s)

    @property
    def all_unusable(self) -> bool:
        """No sampler could answer any prompt of the data set: no training lease will be granted any more."""
        return self._works.all_unusable

    @property
    def active(self) -> int:
        """Leases out now, evaluation included."""
        return sum(work.is_out for work in self._works)

    async def grant(
        self,
        sampler_id: str,
        session_epoch: int,
        max_leases: int,
        policy_version: int,
        wait_s: float,
        refused: Callable[[], str] = str,
    ) -> Granted:
        """Up to `max_leases`; waits up to `wait_s` for the first. Evaluation goes before training.

        `refused` gives the reason why the caller gets none now, or "": asked again at each `wake`, it ends the wait.
        Cancelling the call gives back what it took. Raises StorageError when the journal fails.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            if reason := refused():
                return Granted(leases=(), reason=reason)
            changed = self._changed
            taken, reason, brief = self._take(sampler_id, session_epoch, max_leases, policy_version)
            if taken:
                return await self._hand_out(taken)
            if brief:
                until = min(until, loop.time() + _VERSION_WAIT_S)
            left = until - loop.time()
            if left <= 0:
                return Granted(leases=(), reason=reason)
            if changed is self._changed:
                await self.wait_for_change(min(left, self._next_expiry_s()))

    async def _hand_out(self, taken: Sequence[Work]) -> Granted:
        leases = tuple(self._lease(work, work.holder) for work in taken if work.holder is not None)
        try:
            if (following := self._works.following) > self._recorded:
                await self._around.record(following, self._works.floor)
                self._recorded = max(self._recorded, following)
        except BaseException:
            self._take_unheard(taken, leases)
            raise
        return Granted(leases=leases)

    def _take_unheard(self, taken: Sequence[Work], leases: Sequence[Lease]) -> None:
        """Back what nobody was told of: such a grant does not count, or a full disk would use them all up."""
        pairs = zip(taken, leases, strict=True)
        held = [work for work, lease in pairs if work.holder is not None and str(work.holder.lease) == lease.lease_id]
        for work in held:
            del work.granted_to[work.grants]
            work.grants -= 1
        self._return(held)

    def _take(
        self, sampler_id: str, session_epoch: int, max_leases: int, policy_version: int
    ) -> tuple[list[Work], str, bool]:
        """The works, the reason if there are none, and whether newer weights at the sampler would change that."""
        self.expire()
        if self._version < 0:
            return [], "pacing", False
        if works := self._choose_eval(sampler_id, max_leases, policy_version):
            for work in works:
                self._grant(work, sampler_id, session_epoch, work.min_eval_version)
            return works, "", False
        out, mine = self._training_out(sampler_id)
        waiting = self._around.waiting()
        room = self._pacing.rules.room - out - waiting
        needed = self._pacing.needed_version(sampler_id, self._version, out, waiting)
        if room <= 0 or needed is None:
            return [], "pacing", bool(self._works.eval_waiting())
        if policy_version + 1 < needed:  # one version behind is good enough: the lease makes the sampler wait for it
            return [], "pacing", True
        share, room_bytes = self._share(self._pacing.rules.room) - mine, GRANT_BYTES
        for _ in range(min(room, share, max_leases)):
            if (work := self._works.next_training()) is None:
                return works, "" if works else "no_prompts", False
            room_bytes -= work.size_bytes
            if works and room_bytes < 0:
                self._works.put_back([work])
                break
            self._grant(work, sampler_id, session_epoch, needed)
            works.append(work)
        return works, "" if works else "pacing", False

    def _choose_eval(self, sampler_id: str, max_leases: int, policy_version: int) -> list[Work]:
        mine = sum(work.holder is not None and work.holder.sampler_id == sampler_id for work in self._works.eval_open())
        share = max(0, min(self._share(len(self._works.eval_open())) - mine, max_leases))
        works = [w for w in self._works.eval_waiting() if policy_version + 1 >= w.min_eval_version][:share]
        sizes = accumulate(work.size_bytes for work in works)
        return [work for work, size in zip(works, sizes, strict=True) if work is works[0] or size <= GRANT_BYTES]

    def _share(self, total: int) -> int:
        """What one sampler may hold at once: a step, or an evaluation, ends when its slowest part does."""
        return -(-total // max(1, self._around.samplers()))

    def _training_out(self, sampler_id: str) -> tuple[int, int]:
        """Training leases out, and those of this sampler."""
        out = [work for work in self._works if work.is_out and work.purpose is LeasePurpose.TRAIN]
        return len(out), sum(work.holder is not None and work.holder.sampler_id == sampler_id for work in out)

    def _grant(self, work: Work, sampler_id: str, session_epoch: int, version: int) -> None:
        work.grants += 1
        work.granted_to[work.grants] = sampler_id
        lease = LeaseName(learner_epoch=self._epoch, key=work.key, grant=work.grants)
        self._hold(work, lease, sampler_id, session_epoch, version)

    def _hold(self, work: Work, lease: LeaseName, sampler_id: str, session_epoch: int, version: int) -> None:
        self._works.unqueue(work)
        now = self._clock()
        work.orphaned_until = None
        work.holder = Holder(
            lease=lease,
            sampler_id=sampler_id,
            session_epoch=session_epoch,
            granted_at=now,
            deadline=now + self._rules.ttl_s,
            min_policy_version=version,
        )

    def _lease(self, work: Work, holder: Holder) -> Lease:
        return Lease(
            lease_id=str(holder.lease),
            ttl_ms=int(self._rules.ttl_s * 1000),
            prompt=work.prompt,
            group_size=work.group_size,
            purpose=work.purpose,
            min_policy_version=holder.min_policy_version,
            seed=seed_of(self._rules.run_seed, work.key),
            eval_round=work.eval_round,
        )

    def add_eval(self, round_number: int, version: int, prompts: Sequence[Prompt], samples: int) -> None:
        self._works.add_eval(round_number, version, prompts, samples)
        self.wake()

    def drop_eval(self, round_number: int) -> None:
        """Ends a round: answers that still come are LEASE_LOST."""
        for work in self._works.eval_open():
            if work.eval_round == round_number:
                self._works.remove(work)
        self.wake()

    def renew(
        self, sampler_id: str, session_epoch: int, lease_ids: Iterable[str], policy_version: int
    ) -> tuple[str, ...]:
        """Renews what this sampler holds; returns those of `lease_ids` that are not its own any more."""
        return tuple(
            lease_id
            for lease_id in lease_ids
            if not self._renew(LeaseName.parse(lease_id), sampler_id, session_epoch, policy_version)
        )

    def _renew(self, name: LeaseName | None, sampler_id: str, session_epoch: int, policy_version: int) -> bool:
        work = self._works.get(name.key) if name else None
        if name is None or work is None:
            return False
        holder = work.holder
        if holder is None:
            return self._take_back(work, name, sampler_id, session_epoch)
        if (holder.sampler_id, holder.lease) != (sampler_id, name):
            return False
        now = self._clock()
        holder.session_epoch = session_epoch
        held_s = now - holder.granted_at
        behind = policy_version < holder.min_policy_version and held_s > self._rules.ttl_s
        if held_s < _MAX_HOLD * self._rules.ttl_s and not behind:
            holder.deadline = now + self._rules.ttl_s
        return True

    def _take_back(self, work: Work, name: LeaseName, sampler_id: str, session_epoch: int) -> bool:
        """An orphan, or an expired lease that nobody else has been granted yet, goes back to who works on it."""
        ours = name.learner_epoch == self._epoch
        if ours and work.granted_to.get(name.grant) != sampler_id:
            return False
        self._hold(work, name, sampler_id, session_epoch, work.min_eval_version)
        return True

    def release(self, sampler_id: str, lease_ids: Iterable[str], reason: str) -> None:
        """Gives leases back; those that are not this sampler's are ignored."""
        for lease_id in lease_ids:
            if (work := self._held(lease_id, sampler_id)) is None:
                continue
            if reason in PROMPT_FAULTS:
                self._works.call_unusable(work.prompt, sampler_id, self._around.samplers())
                self._works.give_up(work)
            else:
                self._works.put_back([work])
        self.wake()

    def replace_session(self, sampler_id: str) -> None:
        """A newer process of this sampler registered: the leases of the older one end soon."""
        for work in self._works:
            if work.holder is not None and work.holder.sampler_id == sampler_id:
                work.holder.deadline = min(work.holder.deadline, self._clock() + self._rules.grace_s)

    def expire(self) -> None:
        """Takes back what is overdue or held by a lost session."""
        now = self._clock()
        overdue = [work for work in self._works if work.is_out and self._is_overdue(work, now)]
        if overdue:
            self._return(overdue)

    def _is_overdue(self, work: Work, now: float) -> bool:
        if work.holder is None:
            return work.orphaned_until is not None and now >= work.orphaned_until
        return now >= work.holder.deadline or not self._around.alive(work.holder.sampler_id, work.holder.session_epoch)

    def _next_expiry_s(self) -> float:
        """Until the table may change by itself; sessions are lost without an event, so at most one second."""
        now = self._clock()
        ends = [w.holder.deadline if w.holder else w.orphaned_until or now for w in self._works if w.is_out]
        return max(0.01, min([end - now for end in ends] + [1.0]))

    def _return(self, works: Sequence[Work]) -> None:
        self._works.put_back(works)
        self.wake()

    def _held(self, lease_id: str, sampler_id: str) -> Work | None:
        """The work, if this lease of this sampler is out. An orphan belongs to whoever names it, as in a heartbeat."""
        name = LeaseName.parse(lease_id)
        work = self._works.get(name.key) if name else None
        if name is None or work is None:
            return None
        if work.holder is None:
            return work if work.is_out and name.learner_epoch != self._epoch else None
        return work if (work.holder.sampler_id, work.holder.lease) == (sampler_id, name) else None

    def facts(self, lease_id: str, sampler_id: str) -> LeaseFacts:
        """What admission needs to know of the lease that a group of this sampler names."""
        name = LeaseName.parse(lease_id)
        if name is None:
            return LeaseFacts(standing=Standing.NEVER)
        work = self._works.get(name.key)
        if work is None:
            over = name.number is None or name.number < self._works.following
            return LeaseFacts(standing=Standing.OVER if over else Standing.NEVER)
        if name.learner_epoch == self._epoch and work.granted_to.get(name.grant) != sampler_id:
            return LeaseFacts(standing=Standing.OVER if work.reopened else Standing.NEVER)
        return LeaseFacts(
            standing=Standing.OPEN,
            prompt=work.prompt,
            purpose=work.purpose,
            eval_round=work.eval_round,
            group_size=work.group_size,
            min_policy_version=work.min_eval_version,
        )

    def answer(self, lease_id: str, sampler_id: str) -> Work:
        """Takes the work out because a group for it is accepted; `take_back` undoes it. `facts` must say OPEN."""
        name = LeaseName.parse(lease_id)
        work = self._works.get(name.key) if name else None
        if work is None:
            raise ValueError(f"lease {lease_id!r} is not open")
        if work.holder is not None and work.holder.sampler_id == sampler_id:
            self._pacing.delivered(sampler_id, self._clock() - work.holder.granted_at)
        self._works.remove(work)
        return work

    def take_back(self, work: Work) -> None:
        """The group that answered is not in the journal after all: it comes again, so its lease stays out."""
        if work.is_out:
            self._works.keep(work)
            self.wake()
        else:
            self._return([work])

    def refuse(self, lease_id: str, sampler_id: str) -> None:
        """The group that this sampler made for the lease was not accepted: the lease is free at once."""
        if (work := self._held(lease_id, sampler_id)) is not None:
            self._return([work])

    def reopen(self, numbers: Iterable[int]) -> None:
        """Accepted groups of these training prompts were dropped: the prompts are granted again before new ones."""
        for number in numbers:
            self._works.reopen(number)
        self.wake()

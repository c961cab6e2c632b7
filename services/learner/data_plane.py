"""The learner's side of data, as one object: prompts go out as leases, groups come in, batches come out.

    ControlService ─► sessions, leases ◄─ pacing          WeightService, publisher ─► advance(version, root)
    RolloutService ─► intake ─► journal ─► buffer ─► take_batch ─► trainer ─► mark_trained

Every acknowledged training group is trained exactly once, or dropped once with a recorded reason.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.learner.admission import fault_of
from services.learner.batches import TrainGroup
from services.learner.buffer import Dropped, GroupBuffer, PendingGroup
from services.learner.data_settings import DataSettings
from services.learner.dataset import Dataset, PromptOrder
from services.learner.disk_room import DiskRoom
from services.learner.evaluation import EvalRound, Evaluation
from services.learner.intake import Accepted, Intake
from services.learner.journal import DAMAGED, OLDER_JOURNAL, OTHER_SETTINGS, Journal
from services.learner.journal_rows import PendingRow
from services.learner.journal_schema import Recovered
from services.learner.leases import LeaseTable, Surroundings
from services.learner.pacing import Pacing
from services.learner.published import Origin, PublishedVersions
from services.learner.sessions import Sessions
from services.learner.tally import Tally
from services.learner.work import Work
from services.runtime.errors import BadInputError, ConfigError
from services.runtime.log import get_logger
from services.wire.convert import decode_group
from services.wire.types import LeasePurpose, Prompt, ScoredGroup

_log = get_logger("learner.data")

JOURNAL_FILE = "journal.sqlite3"


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenBatch:
    """Groups for one step from policy `learner_version`; `ids` are their rows in the journal, in the same order."""

    learner_version: int
    ids: tuple[int, ...]
    groups: tuple[TrainGroup, ...]


class DataPlane:
    """Open it, `restore`, run `run()` as a task, `advance` to the first version; then leases are granted."""

    def __init__(
        self,
        *,
        settings: DataSettings,
        train: Dataset,
        journal: Journal,
        recovered: Recovered,
        room: DiskRoom,
        clock: Callable[[], float],
        unix_ms: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._train = train
        self._journal = journal
        self._recovered = recovered
        self._clock = clock
        self.room = room
        self._in_training: dict[int, int] = {}
        self._step = 0
        self._background: set[asyncio.Task[None]] = set()
        self._all_unusable = asyncio.Event()
        self.versions = PublishedVersions(recovered.versions)
        self.sessions = Sessions(
            run_id=settings.run_id,
            learner_epoch=recovered.learner_epoch,
            ttl_s=settings.session_ttl_s,
            store=journal,
            clock=clock,
            denied=recovered.denied,
        )
        self.leases = LeaseTable(
            rules=settings.leases,
            order=PromptOrder(train, settings.seed, settings.shuffle),
            pacing=Pacing(settings.pacing, clock),
            learner_epoch=recovered.learner_epoch,
            clock=clock,
            around=Surroundings(
                waiting=lambda: self.waiting,
                alive=self.sessions.is_alive,
                samplers=self.sessions.alive_count,
                record=journal.record_leases,
                given_up=self._given_up,
            ),
        )
        self.evaluation = Evaluation(self.leases, journal.raise_eval_round)
        self.buffer = GroupBuffer(
            max_staleness=settings.pacing.max_staleness,
            max_age_s=settings.max_age_s,
            clock=clock,
            on_drop=self._on_drop,
        )
        self.intake = Intake(
            journal=journal,
            heads=recovered.heads,
            form=settings.form,
            max_staleness=settings.pacing.max_staleness,
            versions=self.versions,
            leases=self.leases,
            sessions=self.sessions,
            room=room,
            deliver=self._deliver,
            unix_ms=unix_ms,
        )

    @classmethod
    async def open(
        cls,
        state_dir: Path,
        settings: DataSettings,
        train: Dataset,
        clock: Callable[[], float] = time.monotonic,
        unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        known_epoch: int = 0,
        room: DiskRoom | None = None,
    ) -> "DataPlane":
        """Opens the journal and raises the learner's epoch, above `known_epoch`. The caller holds state_dir's lock.

        Raises ConfigError for a journal of another run, StorageError.
        """
        journal, recovered = await Journal.open(state_dir / JOURNAL_FILE, settings.run_id, known_epoch)
        return cls(
            settings=settings,
            train=train,
            journal=journal,
            recovered=recovered,
            room=room or DiskRoom(),
            clock=clock,
            unix_ms=unix_ms,
        )

    async def close(self) -> None:
        """After `flush`, and after `run` was cancelled."""
        if self._background:
            await asyncio.gather(*self._background)
        await self._journal.close()

    async def run(self) -> None:
        """For ever; a task of the process. Raises StorageError when the journal is not to be trusted any more, and
        BadInputError when samplers can use no prompt of the data set."""
        ends = [
            asyncio.ensure_future(work) for work in (self.intake.run(), self._journal.fail(), self._fail_unusable())
        ]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    async def _fail_unusable(self) -> None:
        await self._all_unusable.wait()
        raise BadInputError(
            f"samplers can use no prompt of {self._train.path}: each is longer than data.max_prompt_tokens, or its "
            "reference answer cannot be graded (leases_released above says which)"
        )

    async def flush(self) -> None:
        """Waits until every group submitted until now is durable."""
        await self.intake.flush()

    @property
    def learner_epoch(self) -> int:
        return self._recovered.learner_epoch

    @property
    def learner_version(self) -> int:
        """Newest published version; -1 before the first."""
        return self.versions.current

    @property
    def tally(self) -> Tally:
        """Counts over the whole run; see `tally.Tally` for the invariant."""
        return self._journal.tally

    @property
    def waiting(self) -> int:
        """Training groups between their acknowledgement and the version that they lead to."""
        return len(self.buffer) + self.intake.committing + sum(self._in_training.values())

    def state(self, step: int) -> dict[str, int | str]:
        """What a checkpoint after `step` keeps of the data side; the journal holds everything else."""
        return {
            "step": step,
            "version": self.versions.current,
            "root": self.versions.current_root,
            "dataset_sha256": self._train.sha256,
        }

    async def restore(self, state: Mapping[str, int | str] | None) -> None:
        """Takes the journal to the checkpoint's step (None: to before the first step) and refills the buffer.

        Call it once, before `run`. Groups that were trained after that step are trained again; those of versions that
        the restored learner has not made are dropped as FUTURE_VERSION and their prompts granted again; all that wait
        are dropped where the journal is the older one of the two. Raises ConfigError when the data set is another one
        than the checkpoint's.
        """
        root = None if state is None else str(state["root"])
        state = state or {"step": 0, "version": 0, "dataset_sha256": self._train.sha256}
        if state["dataset_sha256"] != self._train.sha256:
            raise ConfigError(f"data set {self._train.path} has changed since the checkpoint: start a new run for it")
        self._step, version = int(state["step"]), int(state["version"])
        older = root is not None and self.versions.origin(version, root) is not Origin.PUBLISHED
        await self._journal.rewind_to(self._step, version)
        self.versions.roll_back(version)
        rows = await self._sound_pending(older)
        floor, following = self._recovered.leases_floor, self._recovered.leases_next
        answered, lost = await self._journal.answered(floor), await self._journal.lost()
        self.leases.restore(following, floor, answered, lost)
        self.buffer.add(
            PendingGroup(
                id=row.id,
                sampler_id=row.sampler_id,
                lease_number=row.lease_number,
                policy_version=row.policy_version,
                payload=row.payload,
                arrived=self._clock(),
            )
            for row in rows
        )
        _log.info("journal_restored", step=self._step, version=version, groups=len(rows), leases=following - floor)

    async def _sound_pending(self, older: bool) -> list[PendingRow]:
        """The groups that wait, without those that may not be trained: these are dropped. A checkpoint is written after
        its version is in the journal, so an `older` journal is a copy that was put beside a newer checkpoint."""
        rows = await self._journal.pending()
        unfit = await asyncio.to_thread(
            lambda: {row.id: reason for row in rows if (reason := OLDER_JOURNAL if older else self._unfit(row))}
        )
        counts = Counter(unfit.values())
        if older:
            _log.error("journal_older_than_checkpoint", groups_dropped=counts[OLDER_JOURNAL])
        if counts[DAMAGED]:
            _log.error("journal_payloads_damaged", groups_dropped=counts[DAMAGED])
        if counts[OTHER_SETTINGS]:
            _log.warning("groups_of_other_settings", groups_dropped=counts[OTHER_SETTINGS])
        await self._journal.mark_dropped(list(unfit.items()), self._step)
        return [row for row in rows if row.id not in unfit]

    def _unfit(self, row: PendingRow) -> str:
        """Why this group may not be trained, or ""."""
        if not row.sound:
            return DAMAGED
        group, rules = decode_group(row.payload), self._settings
        ours = len(group.completions) == rules.leases.group_size and fault_of(group, rules.form) is None
        return "" if ours else OTHER_SETTINGS

    async def advance(self, version: int, root: str) -> None:
        """`version` is published and durable: groups of it are welcome, and there is room for new leases.

        Raises ConfigError when this run published other weights under that number.
        """
        try:
            self.versions.publish(version, root)
        except ValueError as error:
            raise ConfigError(f"{error}: this folder holds another run's state; set another run.state_dir") from None
        await self._journal.record_version(version, root)
        for trained in [old for old in self._in_training if old < version]:
            del self._in_training[trained]
        self.leases.advance(version)

    async def take_batch(self, count: int, learner_version: int) -> TakenBatch:
        """Waits for `count` groups with 0 <= learner_version - policy_version <= max_staleness: `GroupBuffer.take`.

        `learner_version` is the policy that the step starts from. Cancelling it loses nothing.
        """
        taken = await self.buffer.take(count, learner_version)
        self._in_training[learner_version] = self._in_training.get(learner_version, 0) + len(taken)
        try:
            decoded = await asyncio.to_thread(lambda: [decode_group(group.payload) for group in taken])
        except asyncio.CancelledError:
            self._in_training[learner_version] -= len(taken)
            self.buffer.add(taken)
            raise
        now = self._clock()
        return TakenBatch(
            learner_version=learner_version,
            ids=tuple(pending.id for pending in taken),
            groups=tuple(
                TrainGroup(
                    group=group,
                    sampler_id=pending.sampler_id,
                    staleness=learner_version - pending.policy_version,
                    age_s=now - pending.arrived,
                )
                for pending, group in zip(taken, decoded, strict=True)
            ),
        )

    async def mark_trained(self, batch: TakenBatch, step: int) -> None:
        """After the optimizer took `step` (from 1) with this batch, before the next `take_batch`."""
        stalenesses = [group.staleness for group in batch.groups]
        await self._journal.mark_trained(list(zip(batch.ids, stalenesses, strict=True)), step)
        self._step = step
        for group in batch.groups:
            self.tally.count_lengths(self.tally.lengths_trained, _lengths(group.group))

    async def drop_batch(self, batch: TakenBatch, reason: str, step: int) -> None:
        """Instead of `mark_trained`: the step that would have been `step` was not applied, for `reason`."""
        await self._journal.mark_dropped([(row, reason) for row in batch.ids], step)
        self._in_training.pop(batch.learner_version, None)
        self.leases.wake()

    def _deliver(self, accepted: Sequence[Accepted]) -> None:
        now = self._clock()
        self.buffer.add(
            PendingGroup(
                id=one.id,
                sampler_id=one.sampler_id,
                lease_number=one.work.number,
                policy_version=one.group.policy_version,
                payload=one.payload,
                arrived=now,
            )
            for one in accepted
            if one.work.purpose is LeasePurpose.TRAIN
        )
        for one in accepted:
            if one.work.purpose is LeasePurpose.EVAL:
                self.evaluation.answer(one.work.eval_round, one.work.eval_index, one.group)

    def _given_up(self, work: Work) -> None:
        _log.warning("prompt_given_up", prompt_id=work.prompt.prompt_id, purpose=work.purpose.name, grants=work.grants)
        if work.purpose is LeasePurpose.EVAL:
            self.evaluation.give_up(work.eval_round, work.eval_index)
        elif self.leases.all_unusable:
            self._all_unusable.set()

    async def _on_drop(self, dropped: tuple[Dropped, ...]) -> None:
        """Goes on when the caller is cancelled: these groups are in the buffer no more."""
        task = asyncio.create_task(self._record_drops(dropped))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        await asyncio.shield(task)

    async def _record_drops(self, dropped: tuple[Dropped, ...]) -> None:
        lengths = await asyncio.to_thread(lambda: [_lengths(decode_group(drop.group.payload)) for drop in dropped])
        reasons = [(drop.group.id, drop.reason.value) for drop in dropped]
        await self.room.until_written("drops", lambda: self._journal.mark_dropped(reasons, self._step + 1))
        for drop, tokens in zip(dropped, lengths, strict=True):
            self.tally.count_lengths(self.tally.lengths_dropped, tokens)
            _log.info("group_dropped", group=drop.group.id, reason=drop.reason.value, longest=max(tokens))
        self.leases.reopen(drop.group.lease_number for drop in dropped)

    async def evaluate(self, prompts: Sequence[Prompt], samples: int) -> EvalRound:
        """Starts a round with the newest version; await its `result()`, or `evaluation.cancel(round)`."""
        return await self.evaluation.start(self.versions.current, prompts, samples)


def _lengths(group: ScoredGroup) -> list[int]:
    """Completion lengths in tokens."""
    return [len(completion.token_ids) for completion in group.completions]

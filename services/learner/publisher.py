"""New weights to a published version, off the training path.

    bf16 bits ─► encode against the baseline ─► objects ─► all durable ─► manifest row ─► baseline advances ─► announce
                                                    └─► told of while the next ones are made

A crash before the row leaves objects that nobody names; a crash after it leaves a version that is complete.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from services.learner.config import PublishSection
from services.learner.object_store import ObjectStore
from services.learner.versions import Version, VersionFiles
from services.runtime.errors import HeteroRLError
from services.runtime.failpoints import hit
from services.runtime.log import get_logger
from services.wire.convert import encode_manifest
from services.wire.delta import UpdateInfo, Weights, compiled, iter_encode, root_of
from services.wire.delta.codec import Comparison
from services.wire.delta.part import read_info
from services.wire.delta.update import merge_infos
from services.wire.signing import ManifestSigner
from services.wire.types import Manifest, ObjectRef, PlanStep, SignedManifest, UpdateKind

_log = get_logger("learner.publisher")


_ENCODER_NICENESS = 5
"""Beside a thread of the trainer an encoder gets a quarter of a processor, and all of one that is free."""

_COMPILED_FROM_BYTES = 64 << 20
"""For smaller policies compiling takes longer than it saves in a hundred versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What every manifest of this learner process says."""

    run_id: str
    learner_epoch: int
    model_files_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """A published version with its weights: the base of the next delta, the source of a keyframe."""

    version: Version
    weights: Weights
    base_number: int
    """The first version with these weights: deltas start there, so that those around a version that changed nothing
    still follow each other."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class News:
    """The newest version, and what is there of the update that is being made for the next one."""

    version: Version
    coming: PlanStep | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """`delta_ratio` is full size / update size; `changed_share` of all elements; 0 where nothing was encoded."""

    version: int
    root: str
    update_bytes: int
    full_bytes: int
    delta_ratio: float
    changed_share: float
    seconds: float
    store_s: float
    """Of these, until objects and manifest row were durable, where encoding did not go on beside it."""


class Publisher:
    """Owns the baseline and the announcement. One `publish` at a time. `root_last`: whether everybody can read updates
    of which only the last part names the target root: the first part is there sooner then."""

    def __init__(
        self,
        *,
        store: ObjectStore,
        versions: VersionFiles,
        facts: RunFacts,
        signer: ManifestSigner | None,
        settings: PublishSection,
        root_last: Callable[[], bool] = lambda: False,
        unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._store = store
        self._versions = versions
        self._facts = facts
        self._signer = signer
        self._settings = settings
        self._root_last = root_last
        self._unix_ms = unix_ms
        self._encoder = ThreadPoolExecutor(1, "publish", initializer=_give_way)
        self._latest: Snapshot | None = None
        self._news: News | None = None
        self._told = asyncio.Event()

    @property
    def latest(self) -> Snapshot:
        """The newest version. Raises HeteroRLError before the first."""
        if self._latest is None:
            raise HeteroRLError("no version is published yet")
        return self._latest

    async def publish(self, version: int, weights: Weights, comparison: Comparison | None = None) -> Published:
        """*Consumes* fresh bits of the new weights, and where it is known how they compare with the version before;
        *waits for* encoding and the disk, in threads; *produces* the version, durable and announced; *on cancel* the
        version may or may not exist on disk, and is not announced.

        Raises StorageError, or InvalidWeightsError where the weights are of another model than the version before.
        """
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        publishing = True

        def tell(coming: PlanStep) -> None:
            with contextlib.suppress(RuntimeError):  # the process ends, and its loop has ended
                loop.call_soon_threadsafe(lambda: self._tell(coming) if publishing else None)

        try:
            row, published, store_s = await loop.run_in_executor(
                self._encoder, self._make, version, weights, comparison, self._root_last(), tell
            )
        except BaseException:
            self._tell(None)
            raise
        finally:
            publishing = False
        base = version if row.update is not None or self._latest is None else self._latest.base_number
        self._advance(row, weights, base)
        seconds = time.perf_counter() - started
        _log.info(
            "version_published",
            version=version,
            root=row.root[:12],
            bytes=published.update_bytes,
            seconds=round(seconds, 3),
            store_s=round(store_s, 3),
        )
        return Published(
            version=version,
            root=row.root,
            update_bytes=published.update_bytes,
            full_bytes=published.full_bytes,
            delta_ratio=published.full_bytes / published.update_bytes if published.update_bytes else 0.0,
            changed_share=published.changed / max(1, published.parameters),
            seconds=seconds,
            store_s=store_s,
        )

    async def restore(self, version: int, weights: Weights, root: str) -> None:
        """Goes on from a checkpoint: later versions are forgotten, and `version` is announced under this epoch.

        Raises HeteroRLError when the weights do not have the root that the checkpoint names.
        """
        actual = await asyncio.to_thread(root_of, weights, self._settings.workers)
        if actual != root:
            raise HeteroRLError(f"the checkpoint's weights have root {actual[:12]}, not {root[:12]}: they are damaged")
        row = await asyncio.to_thread(self._adopt, version, weights, root)
        base = row.update.target_version if row.update is not None else version
        self._advance(row, weights, base)

    async def wait_for_news(self, seen: News | None) -> News:
        """*Waits for* news that are not `seen`; *produces* the newest, skipping what came between; *on cancel* nothing
        is lost."""
        while self._news is None or self._news is seen:
            await self._told.wait()
        return self._news

    def _advance(self, row: Version, weights: Weights, base_number: int) -> None:
        """From now on this is the baseline."""
        if self._latest is None and row.manifest.decoded.full_bytes >= _COMPILED_FROM_BYTES:
            self._encoder.submit(compiled.prepare)
        self._latest = Snapshot(version=row, weights=weights, base_number=base_number)
        self._tell(None)

    def _tell(self, coming: PlanStep | None) -> None:
        if self._latest is not None:
            self._news = News(version=self._latest.version, coming=coming)
            self._told.set()
            self._told = asyncio.Event()

    def _make(
        self,
        number: int,
        weights: Weights,
        comparison: Comparison | None,
        root_last: bool,
        tell: Callable[[PlanStep], None],
    ) -> tuple[Version, Manifest, float]:
        """Encodes, stores, writes the row; the seconds that storing took. `tell` hears of each part. Blocks."""
        base = self._latest
        hit("publish.before_objects")
        infos: list[UpdateInfo] = []
        refs: list[ObjectRef] = []
        store_s, changed = 0.0, 0
        with ThreadPoolExecutor(1, "sync") as syncing:
            durable: list[Future[None]] = []
            for part in self._encode(base, number, weights, comparison, root_last):
                infos.append(read_info(part))
                changed += infos[-1].changed
                began = time.perf_counter()
                refs.append(self._store.write(part))
                durable.append(syncing.submit(self._store.sync, refs[-1]))
                store_s += time.perf_counter() - began
                if base is None or changed:
                    tell(_step(infos[-1], number, refs))
            began = time.perf_counter()
            for one in durable:
                one.result()
            store_s += time.perf_counter() - began
        info = merge_infos(infos)
        hit("publish.after_objects")
        update = _step(info, number, refs)
        manifest = self._manifest(number, info.target_root, info.base_root or "", weights, info.changed, info.bytes)
        same = base is not None and base.version.root == info.target_root
        row = Version(manifest=self._signed(manifest), update=None if same else update)
        began = time.perf_counter()
        self._versions.write(row)
        store_s += time.perf_counter() - began
        hit("publish.after_manifest")
        return row, manifest, store_s

    def _encode(
        self, base: Snapshot | None, number: int, weights: Weights, comparison: Comparison | None, root_last: bool
    ) -> Iterator[bytes]:
        if base is None:
            return iter_encode(
                None,
                weights,
                run_id=self._facts.run_id,
                target_version=number,
                workers=self._settings.workers,
            )
        return iter_encode(
            base.weights,
            weights,
            run_id=self._facts.run_id,
            base_version=base.base_number,
            target_version=number,
            base_root=base.version.root,
            codec=self._settings.codec,
            workers=self._settings.workers,
            comparison=comparison if comparison is not None and comparison.base is base.weights else None,
            root_last=root_last,
        )

    def _adopt(self, number: int, weights: Weights, root: str) -> Version:
        """The restored version's row: its update is kept where it led to these very weights."""
        known = self._versions.rows.get(number)
        update = known.update if known is not None and known.root == root else None
        self._versions.remove([row for row in self._versions.rows if row > number])
        manifest = self._manifest(number, root, "", weights, 0, 0)
        row = Version(manifest=self._signed(manifest), update=update)
        self._versions.write(row)
        return row

    def _manifest(
        self, number: int, root: str, parent: str, weights: Weights, changed: int, update_bytes: int
    ) -> Manifest:
        return Manifest(
            run_id=self._facts.run_id,
            learner_epoch=self._facts.learner_epoch,
            version=number,
            root=root,
            parent_root=parent,
            full_bytes=sum(tensor.nbytes for tensor in weights.values()),
            parameters=sum(tensor.bits.size for tensor in weights.values()),
            changed=changed,
            model_files_sha256=self._facts.model_files_sha256,
            published_unix_ms=self._unix_ms(),
            update_bytes=update_bytes,
        )

    def _signed(self, manifest: Manifest) -> SignedManifest:
        data = encode_manifest(manifest)
        signature = b"" if self._signer is None else self._signer.sign(data)
        return SignedManifest(manifest=data, signature=signature, decoded=manifest)


def _step(info: UpdateInfo, number: int, refs: list[ObjectRef]) -> PlanStep:
    return PlanStep(
        kind=UpdateKind[info.kind.name],
        base_root=info.base_root or "",
        target_root=info.target_root,
        target_version=number,
        objects=tuple(refs),
    )


def _give_way() -> None:
    """For a thread, and those that it starts: training goes first. Only Linux has this for threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + _ENCODER_NICENESS))

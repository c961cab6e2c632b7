import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.runtime.backoff import Backoff
from services.runtime.errors import InvalidWeightsError
from services.sampler.follower import Follower
from services.sampler.object_cache import ObjectCache
from services.sampler.tally import Tally
from services.sampler.weight_sources import WeightSources
from services.wire.delta import BitTensor, root_of
from services.wire.signing import ManifestSigner
from tests.support.scripted_learner import RUN_ID, ScriptedWeights, Served, serving


@dataclass(slots=True)
class RecordingEngine:
    """Keeps what it is given, as an engine does; refuses versions in `refused`."""

    loaded: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    roots: list[str] = field(default_factory=list[str])
    refused: set[int] = field(default_factory=set[int])

    async def load(self, weights: Mapping[str, BitTensor], version: int, root: str) -> float:
        if version in self.refused:
            raise InvalidWeightsError("does not fit")
        self.loaded.append((version, root))
        self.roots.append(root_of(weights))
        return 0.0


def weights_of(seed: int, size: int = 3000) -> dict[str, BitTensor]:
    bits = np.random.default_rng(seed).integers(0, 0x7F00, size, dtype=np.uint16)
    return {"model.a": BitTensor(dtype="BF16", shape=(size,), bits=bits)}


def changed(weights: Mapping[str, BitTensor], at: int, value: int | None = None) -> dict[str, BitTensor]:
    bits = weights["model.a"].bits.copy()
    bits[at] = bits[at] ^ 1 if value is None else value
    return {"model.a": BitTensor(dtype="BF16", shape=weights["model.a"].shape, bits=bits)}


@dataclass(slots=True, kw_only=True)
class Following:
    follower: Follower
    engine: RecordingEngine
    tally: Tally
    cache: ObjectCache
    sources: WeightSources


@asynccontextmanager
async def following(
    served: Served, signer: ManifestSigner, directory: Path, *, by_relay: bool = False
) -> AsyncIterator[Following]:
    tally = Tally()
    stub = WeightServiceStub(served.channel)
    sources = WeightSources(stub, stub if by_relay else None)
    cache = ObjectCache(directory, sources, 1 << 20)
    follower = Follower(
        sources=sources,
        cache=cache,
        tally=tally,
        run_id=RUN_ID,
        public_key=signer.public_key,
        news=asyncio.Event(),
        backoff=Backoff(uniform=lambda _, longest: 0.02 * longest),
    )
    engine = RecordingEngine()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(follower.watch())]
        async with asyncio.timeout(10):
            held = await follower.first()
        await engine.load(held.weights, held.version, held.root)
        await follower._note_loaded(held)
        running.append(tasks.create_task(follower.follow(engine)))
        yield Following(follower=follower, engine=engine, tally=tally, cache=cache, sources=sources)
        for task in running:
            task.cancel()


@pytest.fixture
def signer(tmp_path: Path) -> ManifestSigner:
    return ManifestSigner.load_or_create(tmp_path / "key.pem")


async def test_versions_are_followed_by_deltas_and_roots_hold(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(1)
    await server.publish(weights)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        for at in range(3):
            weights = changed(weights, at)
            await server.publish(weights)
            async with asyncio.timeout(10):
                await follows.follower.reached(at + 1)
        assert [version for version, _ in follows.engine.loaded] == [0, 1, 2, 3]
        assert follows.engine.roots == [root for _, root in follows.engine.loaded]
        assert follows.follower.root == root_of(weights)
        assert [plan.have_root != "" for plan in server.plans] == [False, True, True, True]


async def test_a_fetch_that_is_cut_goes_on_where_it_was(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    server.cut_bytes = [1, 1499, 700, 0, 1001]
    await server.publish(weights_of(2))
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        assert server.offsets == [0, 1, 1500, 2200, 2200, 3201]
        assert follows.tally.weights_bytes == sum(map(len, server.objects.values()))
        assert follows.tally.keyframes_refetched == 0


async def test_a_part_on_disk_is_used_by_the_next_process(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    update = await server.publish(weights_of(3))
    name = hashlib.sha256(update.parts[0]).hexdigest()
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / f"{name}.part").write_bytes(update.parts[0][:2345])
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        assert server.offsets == [2345]
        assert follows.follower.version == 0


async def test_a_cache_that_somebody_removed_is_made_again(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(3)
    await server.publish(weights)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        shutil.rmtree(tmp_path / "objects")
        await server.publish(changed(weights, 7))
        async with asyncio.timeout(10):
            await follows.follower.reached(1)
        assert follows.follower.root == root_of(changed(weights, 7))


async def test_a_wrong_part_on_disk_costs_that_object_alone(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    update = await server.publish(weights_of(3))
    name = hashlib.sha256(update.parts[0]).hexdigest()
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / f"{name}.part").write_bytes(b"a relay's" * 100)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        assert server.offsets == [900, 0]
        assert follows.tally.keyframes_refetched == 0
        assert follows.follower.version == 0


async def test_a_damaged_delta_is_discarded_and_a_keyframe_fetched(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(4)
    await server.publish(weights)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        server.damaged |= {
            hashlib.sha256(part).hexdigest() for part in (await server.publish(changed(weights, 7))).parts
        }
        async with asyncio.timeout(10):
            await follows.follower.reached(1)
        assert follows.follower.root == root_of(changed(weights, 7))
        assert follows.tally.keyframes_refetched == 1
        assert [plan.keyframe_only for plan in server.plans] == [False, False, True]


async def test_nan_is_refused_and_the_old_version_serves_on(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(5)
    await server.publish(weights)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        await server.publish(changed(weights, 7, value=0x7FC0))
        async with asyncio.timeout(10):
            while not follows.tally.versions_refused:  # noqa: ASYNC110 - nothing announces a refusal
                await asyncio.sleep(0.01)
        assert follows.follower.version == 0
        await server.publish(changed(weights, 8))
        async with asyncio.timeout(10):
            await follows.follower.reached(2)
        assert [version for version, _ in follows.engine.loaded] == [0, 2]


async def test_a_manifest_that_the_learner_did_not_sign_is_never_followed(
    tmp_path: Path, signer: ManifestSigner
) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(6)
    await server.publish(weights)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        server._signer = ManifestSigner.load_or_create(tmp_path / "stranger.pem")
        await server.publish(changed(weights, 1))
        await asyncio.sleep(0.3)
        assert [version for version, _ in follows.engine.loaded] == [0]


async def test_a_version_without_a_changed_bit_still_counts(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(7)
    await server.publish(weights)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        await server.publish(weights)
        async with asyncio.timeout(10):
            await follows.follower.reached(1)
        assert len(server.plans) == 1


async def test_a_version_that_exploded_is_refused_and_the_next_one_taken(
    tmp_path: Path, signer: ManifestSigner
) -> None:
    server = ScriptedWeights(signer)
    weights = {"model.a": BitTensor(dtype="BF16", shape=(3000,), bits=np.full(3000, 0x3C00, np.uint16))}
    await server.publish(weights)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        await server.publish(changed(weights, 7, 0x4780))  # 65536
        async with asyncio.timeout(10):
            while follows.tally.versions_refused == 0:  # noqa: ASYNC110 - a plain counter
                await asyncio.sleep(0.01)
        assert follows.follower.version == 0
        await server.publish(changed(weights, 8))
        async with asyncio.timeout(10):
            await follows.follower.reached(2)
        assert [version for version, _ in follows.engine.loaded] == [0, 2]


async def test_two_versions_memory_is_all_that_a_run_of_versions_takes(tmp_path: Path, signer: ManifestSigner) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(9)
    await server.publish(weights)
    places: list[int] = []
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        for version in range(1, 7):
            weights = changed(weights, version)
            await server.publish(weights)
            async with asyncio.timeout(10):
                await follows.follower.reached(version)
            places.append(follows.follower.held.weights["model.a"].bits.ctypes.data)
        assert follows.engine.roots == [root for _, root in follows.engine.loaded]
    assert len(set(places)) == 2
    assert places[0] != places[1]
    assert places[2:] == places[:-2]


async def test_the_memory_of_a_version_that_the_engine_keeps_is_not_used_again(
    tmp_path: Path, signer: ManifestSigner
) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(10)
    await server.publish(weights)
    async with serving(weights=server) as served, following(served, signer, tmp_path / "objects") as follows:
        follows.engine.refused = {1, 2}
        kept = follows.follower.held.weights
        for version in (1, 2, 3):
            await server.publish(changed(weights, version))
            async with asyncio.timeout(10):
                while follows.follower.held.version != version:  # noqa: ASYNC110 - set by the follower
                    await asyncio.sleep(0.01)
        await follows.follower.reached(3)
        assert root_of(kept) == root_of(weights)


async def test_a_full_disk_empties_the_cache_of_what_nobody_wants_and_is_no_fault_of_the_relay(
    tmp_path: Path, signer: ManifestSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ScriptedWeights(signer)
    weights = weights_of(11)
    await server.publish(weights)
    objects = tmp_path / "objects"
    async with serving(weights=server) as served, following(served, signer, objects, by_relay=True) as follows:
        old = {path.name for path in objects.iterdir()}
        assert old
        write = os.write

        def full_until_there_is_room(descriptor: int, data: bytes) -> int:
            if old & {path.name for path in objects.iterdir()}:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        monkeypatch.setattr("services.sampler.object_ranges.os.write", full_until_there_is_room)
        await server.publish(changed(weights, 7))
        async with asyncio.timeout(10):
            await follows.follower.reached(1)
        assert follows.follower.root == root_of(changed(weights, 7))
        assert not old & {path.name for path in objects.iterdir()}
        assert follows.tally.keyframes_refetched == 0
        assert follows.sources.fallbacks == 0

"""A sampler that is killed while it takes a version, and started again on the same folder."""

import asyncio
import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from services.runtime import failpoints
from services.runtime.address import Address
from services.wire.delta import root_of
from tests.support.weight_site import following, learner_site
from tests.unit.learner.weights_of_tests import make_weights, nudged

SPAWN = multiprocessing.get_context("spawn")


def follow(folder: Path, learner: Address, public_key: bytes, armed: str, report: Connection) -> None:
    """Reports each root that it has, for ever."""

    async def main() -> None:
        failpoints.arm(armed)
        async with following(folder, learner, public_key, channels=2) as sampler:  # so that nothing comes unasked
            version = sampler.follower.version
            while True:
                report.send(await sampler.reach(version, 60.0))
                version += 1

    asyncio.run(main())


def start(*arguments: object) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=follow, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


@pytest.mark.parametrize("point", ["fetch.before_rename", "follow.after_apply"])
async def test_a_sampler_that_is_killed_arrives_when_it_is_started_again(tmp_path: Path, point: str) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, weights := make_weights(1))
        process, roots = start(tmp_path / "s", site.address, site.public_key, f"{point}=1*off->kill")
        assert await asyncio.to_thread(roots.recv) == root_of(weights)
        await site.publisher.publish(1, weights := nudged(weights, 1, 8000))
        await asyncio.to_thread(process.join, 30)
        assert process.exitcode == -signal.SIGKILL
        process, roots = start(tmp_path / "s", site.address, site.public_key, "")
        assert await asyncio.to_thread(roots.recv) == root_of(weights)
        await site.publisher.publish(2, weights := nudged(weights, 2))
        assert await asyncio.to_thread(roots.recv) == root_of(weights)
        process.kill()
        await asyncio.to_thread(process.join, 30)

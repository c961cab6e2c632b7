"""A real `heterorl sampler` process against a real learner: how it drains, is fenced, is killed, and is watched."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sqlite3
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.learner.config import LearnerConfig
from tests.support.learner_in_process import running_learner, small_config

POLICY = Path(__file__).parents[3] / "services" / "lab" / "assets" / "tiny-policy"
pytestmark = [pytest.mark.timeout(300)]


@pytest.fixture
def config(tmp_path: Path) -> LearnerConfig:
    """A run that does not come to its end by itself."""
    return small_config(
        tmp_path,
        POLICY,
        run={"id": "test", "state_dir": tmp_path / "learner", "steps": 100_000},
        sampling={"group_size": 4, "max_completion_tokens": 8},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSampler:
    process: asyncio.subprocess.Process
    state: Path

    async def event(self, name: str) -> Mapping[str, object]:
        """Reads the log on until the event; the process's end before it is an error that shows the log."""
        assert self.process.stderr is not None
        seen: list[bytes] = []
        async with asyncio.timeout(120):
            while line := await self.process.stderr.readline():
                seen.append(line)
                if line.startswith(b"{") and (fields := json.loads(line))["event"] == name:
                    return fields
        raise AssertionError(b"".join(seen).decode())

    async def ended(self) -> tuple[int | None, str]:
        """Exit code, and what it wrote since the last event."""
        async with asyncio.timeout(100):
            _, rest = await self.process.communicate()
        return self.process.returncode, rest.decode()

    async def scrape(self) -> dict[tuple[str, ...], float]:
        """Samples by name and label values."""
        address = (self.state / "metrics_address").read_text().strip()
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read())
        return {
            (sample.name.removeprefix("heterorl_sampler_"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(page.decode())
            for sample in family.samples
        }

    async def until_accepted(self, groups: int) -> dict[tuple[str, ...], float]:
        """Works until the learner has accepted so many; the metrics then."""
        async with asyncio.timeout(120):
            while (samples := await self.scrape()).get(("verdicts_total", "accepted"), 0) < groups:  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.1)
        return samples


@asynccontextmanager
async def running_sampler(learner: str, state: Path, *arguments: str) -> AsyncIterator[RunningSampler]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", "sampler", "--learner", learner, f"--state_dir={state}"),
        *("--connect.insecure=true", "--connect.sampler_id=eu-1", "--engine.threads=1", "--log.format=json"),
        "--metrics_address=127.0.0.1:0",
        *arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        yield RunningSampler(process=process, state=state)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def spooled(state: Path) -> int:
    with sqlite3.connect(state / "spool.db") as database:
        (count,) = database.execute("SELECT COUNT(*) FROM groups").fetchone()
    database.close()
    return count


async def test_a_sampler_shows_its_work_to_prometheus_and_sigterm_drains_it(
    config: LearnerConfig, tmp_path: Path
) -> None:
    async with running_learner(config) as learner, running_sampler(learner.address, tmp_path / "s") as sampler:
        await sampler.event("version_loaded")
        samples = await sampler.until_accepted(6)
        assert samples["groups_generated_total",] >= samples["groups_scored_total",] >= 6
        assert samples["generated_tokens_total",] >= 6 * 4
        assert samples["generation_seconds_total",] > 0
        assert samples["scoring_seconds_total",] > 0
        assert samples["weights_received_bytes_total",] > 100_000
        assert samples["weights_fetch_seconds_total",] > 0
        assert samples["versions_loaded_total",] >= 1
        assert samples["policy_version_versions",] >= 0
        assert samples["spool_limit_bytes",] == 1 << 30
        assert samples["idle_seconds_total", "starting"] > 0
        assert samples["engine_restarts_total",] == samples["grader_restarts_total",] == 0

        sampler.process.send_signal(signal.SIGTERM)
        drained = await sampler.event("sampler_drained")
        assert drained["left_in_spool"] == 0
        code, _ = await sampler.ended()
        assert code == 0
        assert spooled(sampler.state) == 0
        assert not (sampler.state / "metrics_address").exists()


async def test_the_end_of_a_run_is_not_waited_for_until_the_next_heartbeat(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        POLICY,
        run={"id": "test", "state_dir": tmp_path / "learner", "steps": 2},
        lease={"heartbeat_s": 60.0, "session_ttl_s": 180.0},
    )
    async with running_learner(config) as learner, running_sampler(learner.address, tmp_path / "s") as sampler:
        loaded = await sampler.event("version_loaded")
        while loaded["version"] != 2:
            loaded = await sampler.event("version_loaded")
        async with asyncio.timeout(30):  # the next regular heartbeat is at least 48 s away
            await sampler.event("sampler_drained")
        code, _ = await sampler.ended()
        assert code == 0


async def test_a_restarted_learner_hears_at_once_which_weights_are_held_and_grants_leases(tmp_path: Path) -> None:
    def config(address: str, group_size: int) -> LearnerConfig:
        return small_config(
            tmp_path,
            POLICY,
            run={"id": "test", "state_dir": tmp_path / "learner", "steps": 100_000},
            listen={"address": address, "insecure": True},
            sampling={"group_size": group_size, "max_completion_tokens": 8},
            lease={"heartbeat_s": 60.0, "session_ttl_s": 180.0},
            checkpoint={"every_steps": 1},
        )

    async with AsyncExitStack() as stack:
        async with running_learner(config("127.0.0.1:0", 4)) as learner:
            sampler = await stack.enter_async_context(running_sampler(learner.address, tmp_path / "s"))
            while (await sampler.event("version_loaded"))["version"] == 0:
                pass
        before = (await sampler.scrape())["verdicts_total", "accepted"]
        # Groups that were out are of another size, so that no version comes by them.
        async with running_learner(config(learner.address, 2)):
            await sampler.event("registered")
            async with asyncio.timeout(30):  # the next regular heartbeat is at least 48 s away
                await sampler.until_accepted(int(before) + 12)


async def test_a_sampler_that_can_make_no_group_does_not_use_up_the_tries_that_prompts_have(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(POLICY, policy)
    nothing_of_a_sum = "{% if '=' not in messages[-1]['content'] %}{{ messages[-1]['content'] }}{% endif %}"
    (policy / "chat_template.jinja").write_text(nothing_of_a_sum)
    async with (
        running_learner(small_config(tmp_path, policy)) as learner,
        running_sampler(learner.address, tmp_path / "s", "--leases=4") as sampler,
    ):
        assert (await sampler.event("group_dropped"))["reason"] == "generation_failed"
        await asyncio.sleep(2)
        dropped = (await sampler.scrape())["groups_dropped_total", "generation_failed"]
        assert 1 <= dropped < 40  # hundreds in each second without a pause
        sampler.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):  # the pause ends with it
            await sampler.event("sampler_drained")


async def test_a_prompt_that_fills_the_engines_context_is_too_long_whatever_the_learner_allows(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(POLICY, policy)
    long_for_some = "{% set text = messages[-1]['content'] %}{{ text }}{{ 'x' * 5000 if '1+' in text }}"
    (policy / "chat_template.jinja").write_text(long_for_some)
    run = {"id": "test", "state_dir": tmp_path / "learner", "steps": 100_000}
    config = small_config(tmp_path, policy, run=run, data={"max_prompt_tokens": 100_000})
    async with running_learner(config) as learner, running_sampler(learner.address, tmp_path / "s") as sampler:
        assert (await sampler.event("group_dropped"))["reason"] == "prompt_too_long"


async def test_a_sampler_whose_id_a_newer_process_took_ends_with_79(config: LearnerConfig, tmp_path: Path) -> None:
    async with running_learner(config) as learner, running_sampler(learner.address, tmp_path / "older") as older:
        await older.event("version_loaded")
        async with running_sampler(learner.address, tmp_path / "newer") as newer:
            await newer.event("registered")
            code, log = await older.ended()
            assert code == 79
            sentences = [line for line in log.splitlines() if not line.startswith("{")]
            assert len(sentences) == 1
            assert "newer process" in sentences[0]
            await newer.event("version_loaded")
            await newer.until_accepted(2)
            assert newer.process.returncode is None


async def test_the_graders_of_a_killed_sampler_end_within_ten_seconds(config: LearnerConfig, tmp_path: Path) -> None:
    async with running_learner(config) as learner, running_sampler(learner.address, tmp_path / "s") as sampler:
        started = await sampler.event("reward_started")
        await sampler.event("version_loaded")
        await sampler.until_accepted(2)
        assert isinstance(started["pid"], int)
        watched = [started["pid"], *_descendants(started["pid"])]
        assert len(watched) >= 3, "the service, its nursery, a worker"
        ends = [os.pidfd_open(pid) for pid in watched]
        sampler.process.kill()
        try:
            async with asyncio.timeout(10):
                await asyncio.gather(*map(_ended, ends))
        finally:
            for end in ends:
                os.close(end)


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where no learner answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listening
        yield f"127.0.0.1:{bound.getsockname()[1]}"


async def test_a_sampler_that_waits_for_its_learner_holds_its_state_and_ends_at_sigterm(
    nobody: str, tmp_path: Path
) -> None:
    async with running_sampler(nobody, tmp_path / "s") as sampler:
        await sampler.event(f"registering with learner {nobody}")
        samples = await sampler.scrape()
        assert samples["policy_version_versions",] == -1
        assert samples["idle_seconds_total", "starting"] > 0
        async with running_sampler(nobody, tmp_path / "s") as second:
            code, log = await second.ended()
        assert code == 74
        assert str(tmp_path / "s") in log
        sampler.process.send_signal(signal.SIGTERM)
        code, _ = await sampler.ended()
        assert code == 0


def _descendants(pid: int) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *_descendants(child))]


async def _ended(pidfd: int) -> None:
    """A process descriptor can be read when its process has ended."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)

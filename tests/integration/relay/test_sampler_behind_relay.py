"""The whole sampler process behind a relay: model files, versions and groups, with one copy of the weights fetched."""

import asyncio
import sys
from pathlib import Path

import pytest

from services.runtime.address import parse_target
from tests.support.learner_in_process import running_learner, small_config
from tests.support.weight_site import relay_site

POLICY = Path(__file__).parents[3] / "services" / "lab" / "assets" / "tiny-policy"


@pytest.mark.timeout(240)
async def test_a_run_ends_with_all_weights_fetched_by_the_relay(tmp_path: Path) -> None:
    config = small_config(tmp_path, POLICY)
    async with (
        running_learner(config) as learner,
        relay_site(tmp_path / "relay", parse_target(learner.address)) as relay,
    ):
        words = (
            *("-m", "services.cli", "sampler", "--learner", str(learner.address)),
            *("--connect.insecure=true", "--connect.sampler_id=eu-1", f"--connect.weights={relay.address}"),
            *(f"--state_dir={tmp_path / 's'}", "--engine.threads=1"),
        )
        sampler = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.PIPE)
        try:
            _, log = await sampler.communicate()
        finally:
            if sampler.returncode is None:
                sampler.kill()
        assert sampler.returncode == 0, log.decode()[-2000:]
        assert '"fetched_from": "relay"' in log.decode()
        assert '"fetched_from": "learner"' not in log.decode()
        assert "relay_set_aside" not in log.decode()
        await learner.ended
    assert len(list((tmp_path / "relay" / "objects").iterdir())) > 3, "model files, a keyframe and deltas"

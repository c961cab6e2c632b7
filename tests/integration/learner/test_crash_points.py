"""Killed, or without power, at any change of its files: what was promised by then is there at the next start, and
nothing that was under way is left over."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from services.learner.checkpoint import Checkpoints
from services.learner.config import LearnerConfig
from services.learner.export import Provenance, export_policy
from services.learner.policy import Policy
from services.learner.trainer import Trainer
from services.wire.delta import root_of
from tests.e2e.invariants import check_summary
from tests.integration.learner.test_checkpoint import at, fresh
from tests.support.crash_points import CrashState, watching
from tests.support.learner_in_process import running_learner, small_config
from tests.support.scripted_sampler import dial
from tests.support.train_groups import train_group


@pytest.fixture(scope="module")
def made(policy_dir: Path) -> tuple[Policy, Trainer]:
    policy, trainer = fresh(policy_dir)
    trainer.step([train_group(1), train_group(2)])
    return policy, trainer


def places(states: list[CrashState]) -> list[tuple[CrashState, Path]]:
    return [(state, place) for state in states for place in (state.killed, state.power_lost)]


def test_a_finished_checkpoint_outlives_every_later_change_of_the_folder(
    tmp_path: Path, made: tuple[Policy, Trainer]
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    with watching(folder, tmp_path / "copies") as points:
        for step in (1, 2):
            checkpoints.write(at(step, *made), *made)
            points.promised = step
    assert len(points.states) > 20
    for state, place in places(points.states):
        opened = Checkpoints(place, keep=1)
        position = opened.restore(*made)
        assert (0 if position is None else position.step) >= state.promised, state.before
        assert not list(place.glob(".step-*")), state.before
        opened.write(at(9, *made), *made)
        assert opened.steps() == [9], state.before


def test_an_export_that_was_cut_short_is_made_again_and_leaves_nothing_beside_it(
    tmp_path: Path, made: tuple[Policy, Trainer]
) -> None:
    policy, _ = made
    weights = policy.wire_weights()

    def export(folder: Path, run: str, root: str) -> None:
        names = {"run_id": run, "base_model": "m", "loss": "gepo", "accuracy_start": None, "accuracy_end": None}
        provenance = Provenance(**names, steps=1, version=1, root=root)  # type: ignore[arg-type]
        export_policy(folder / "policy", policy, weights, provenance)

    folder = tmp_path / "state"
    export(folder, "earlier", "0" * 64)
    with watching(folder, tmp_path / "copies") as points:
        export(folder, "test", root_of(weights))
    whole = {path.name: path.read_bytes() for path in (folder / "policy").iterdir()}
    assert len(points.states) > 10
    for state, place in places(points.states):
        export(place, "test", root_of(weights))
        assert [path.name for path in place.iterdir()] == ["policy"], state.before
        assert {path.name: path.read_bytes() for path in (place / "policy").iterdir()} == whole, state.before


def before(states: list[CrashState], operation: str) -> CrashState:
    """The first that is followed by this."""
    return next(state for state in states if state.before.startswith(operation))


STEPS = 4


def run_of(folder: Path, policy_dir: Path) -> LearnerConfig:
    """On the state in `folder`."""
    return small_config(
        folder,
        policy_dir,
        run={"id": "test", "state_dir": folder / "state", "steps": STEPS},
        checkpoint={"every_steps": 1, "keep": 1},
        eval={"at_start": True, "at_end": True, "prompts": 2},
        data={"train": folder / "train.jsonl", "eval": folder / "train.jsonl"},
        lease={"heartbeat_s": 1.0, "session_ttl_s": 4.0, "ttl_s": 2.0},
    )


async def finish(config: LearnerConfig, folder: Path) -> None:
    """With a sampler, until the run ends."""
    async with running_learner(config) as learner:
        with suppress(grpc.aio.AioRpcError):  # nothing may be left to do
            sampler = await dial(learner.address, "eu-1", folder / "sampler", lambda answer, text: len(text) % 2)
            await sampler.work()
            await sampler.close()
        await learner.ended


def lines(state_dir: Path, key: str) -> list[int]:
    """Steps of the records that have this metric."""
    path = state_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record["step"] for record in records if key in record]


@pytest.mark.timeout(240)
async def test_a_learner_that_crashed_anywhere_ends_its_run_as_if_it_had_not(tmp_path: Path, policy_dir: Path) -> None:
    config = run_of(tmp_path, policy_dir)
    with watching(config.run.state_dir, tmp_path / "copies") as points:
        await finish(config, tmp_path)
    assert len(points.states) > 100
    for state in points.states:
        steps = Checkpoints(state.power_lost / "checkpoints", keep=1).steps()
        assert lines(state.power_lost, "loss")[: max(steps, default=0)] == list(range(1, max(steps, default=0) + 1))
    last = f"checkpoints/step-{STEPS:08d}"
    crashed = [
        before(points.states, "os.rename checkpoints/.step-00000001").killed,
        before(points.states, "os.fsync checkpoints/.step-00000002").power_lost,
        before(points.states, f"os.fsync {last}/.state.json").killed,  # the last evaluation is in metrics.jsonl alone
        before(points.states, "os.rename .policy.export-").killed,
    ]
    for number, place in enumerate(crashed):
        again = tmp_path / f"again{number}"
        again.mkdir()
        place.rename(again / "state")
        await asyncio.wait_for(finish(run_of(again, policy_dir), again), 60)
        summary = json.loads((again / "state" / "summary.json").read_text())
        check_summary(summary, again / "state" / "journal.sqlite3")
        assert (summary["steps"], summary["groups_trained"]) == (STEPS, 2 * STEPS)
        assert lines(again / "state", "loss") == list(range(1, STEPS + 1))
        assert lines(again / "state", "accuracy") == [0, STEPS]
        assert not [path for path in (again / "state").rglob(".*") if path.name != ".lock"]

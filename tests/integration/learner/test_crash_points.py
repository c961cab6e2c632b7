"""Killed, or without power, at any change of its files: what was promised by then is there at the next start, and
nothing that was under way is left over."""

from pathlib import Path

import pytest

from services.learner.checkpoint import Checkpoints
from services.learner.export import Provenance, export_policy
from services.learner.policy import Policy
from services.learner.trainer import Trainer
from services.wire.delta import root_of
from tests.integration.learner.test_checkpoint import at, fresh
from tests.support.crash_points import CrashState, watching
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
    folder.mkdir()
    with watching(folder, tmp_path / "copies") as points:
        export(folder, "earlier", "0" * 64)
        export(folder, "test", root_of(weights))
    whole = {path.name: path.read_bytes() for path in (folder / "policy").iterdir()}
    assert len(points.states) > 10
    for state, place in places(points.states):
        export(place, "test", root_of(weights))
        assert [path.name for path in place.iterdir()] == ["policy"], state.before
        assert {path.name: path.read_bytes() for path in (place / "policy").iterdir()} == whole, state.before

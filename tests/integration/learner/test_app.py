"""The learner's process, end to end, with samplers that follow a script."""

import asyncio
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.learner import app, disk_room
from services.learner.app import ADDRESS_NAME
from services.runtime import failpoints
from services.runtime.errors import StorageError, UnavailableError
from services.runtime.lifecycle import explain
from services.runtime.log import get_logger
from tests.support.learner_in_process import running_learner, small_config
from tests.support.scripted_sampler import dial


def first_digit(answer: str, text: str) -> float:
    """Dense enough for a random policy to learn from: how the completion begins."""
    return float(text[:1] == answer[:1]) + 0.25 * float(text[:1].isdigit())


async def test_a_run_trains_publishes_and_ends_with_every_group_accounted_for(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir)
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "sampler", first_digit)
        await sampler.work()
        await learner.ended
        await sampler.close()
    summary = json.loads((config.run.state_dir / "summary.json").read_text())
    assert summary["steps"] == summary["final_version"] == 3
    assert summary["groups_trained"] == 6
    assert summary["staleness_max"] <= 2
    left = summary["groups_acknowledged"] - summary["groups_trained"] - sum(summary["groups_dropped"].values())
    assert left >= 0
    assert summary["samplers"][0]["root"] == summary["final_root"] == sampler.root
    assert summary["samplers"][0]["bytes_received"] == sampler.bytes_received
    lines = [json.loads(line) for line in (config.run.state_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss", "grad_norm", "reward_mean", "weight_var", "delta_ratio"} <= lines[0].keys()


async def test_the_exported_policy_has_the_final_versions_bits(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir, run={"id": "test", "state_dir": tmp_path / "state", "steps": 1})
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "sampler", first_digit)
        await sampler.work()
        await learner.ended
        await sampler.close()
    directory = config.run.state_dir / "policy"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(directory).chat_template
    exported = model.get_input_embeddings().weight.view(torch.int16).flatten()
    bits = torch.from_numpy(sampler.weights["model.embed_tokens.weight"].bits.view("int16"))
    assert torch.equal(exported, bits)
    assert "HeteroRL" in (directory / "README.md").read_text()


async def test_a_full_disk_holds_a_run_up_and_ends_nothing(
    tmp_path: Path, policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_room, "_RETRY_S", 0.05)
    config = small_config(tmp_path, policy_dir, checkpoint={"every_steps": 1})
    points = ("publish.before_objects", "publish.after_objects", "journal.before_mark_trained")
    faults = [f"{point}=1*off->2*error(DiskFullError)->off" for point in points]
    # The first is waited for, the second and third are left out, the last of the run is waited for.
    full = "error(DiskFullError)"
    faults.append(f"checkpoint.before_rename=2*{full}->1*off->3*{full}->off")
    failpoints.arm("; ".join(faults))
    try:
        async with running_learner(config) as learner:
            sampler = await dial(learner.address, "eu-1", tmp_path / "sampler", first_digit)
            await sampler.work()
            await learner.ended
            await sampler.close()
    finally:
        failpoints.arm("")
    summary = json.loads((config.run.state_dir / "summary.json").read_text())
    assert (summary["steps"], summary["groups_trained"]) == (3, 6)
    lines = [json.loads(line)["step"] for line in (config.run.state_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3]
    names = {path.name for path in (config.run.state_dir / "checkpoints").iterdir()}
    assert names == {"step-00000001", "step-00000003"}


async def test_a_disk_that_fails_at_a_checkpoint_ends_the_learner(tmp_path: Path, policy_dir: Path) -> None:
    failpoints.arm("checkpoint.before_rename=1*error(StorageError)->off")
    config = small_config(tmp_path, policy_dir, checkpoint={"every_steps": 1})

    async def run() -> None:
        async with running_learner(config) as learner:
            sampler = await dial(learner.address, "eu-1", tmp_path / "sampler", first_digit)
            working = asyncio.create_task(sampler.work())
            await asyncio.wait((learner.ended,), timeout=60)
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await sampler.close()

    try:
        with pytest.raises(ExceptionGroup) as caught:
            await run()
    finally:
        failpoints.arm("")
    error = explain(caught.value, get_logger("test"))
    assert (type(error), error.exit_code) == (StorageError, 74)


async def test_a_signal_ends_it_with_a_checkpoint_and_the_next_start_goes_on(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir)
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "a", first_digit)
        first_epoch = (await sampler.follow()).target.decoded.learner_epoch
        groups = [sampler.generate(lease) for lease in await sampler.lease(2)]
        await sampler.submit(groups)
        while sampler.version < 1:
            await sampler.follow()
        learner.process.request_drain("SIGTERM")
        await learner.ended
        await sampler.close()
    root = sampler.root
    first = json.loads((config.run.state_dir / "summary.json").read_text())
    assert first["steps"] == 1
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "b", first_digit)
        plan = await sampler.follow()
        assert (plan.target.decoded.version, plan.target.decoded.root) == (1, root)
        assert plan.target.decoded.learner_epoch > first_epoch
        await sampler.work()
        await learner.ended
        await sampler.close()
    second = json.loads((config.run.state_dir / "summary.json").read_text())
    assert second["steps"] == 3
    assert second["groups_trained"] == 6
    steps = [json.loads(line)["step"] for line in (config.run.state_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


async def test_a_folder_put_back_from_a_backup_counts_no_start_twice(
    tmp_path: Path, policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr(app, "time", SimpleNamespace(time=lambda: next(seconds)))
    config, backup = small_config(tmp_path, policy_dir), tmp_path / "backup"
    epochs: list[int] = []
    for before in ("a first start", "back up", "put back"):
        if before == "back up":
            shutil.copytree(config.run.state_dir, backup)
        if before == "put back":
            shutil.rmtree(config.run.state_dir)
            backup.rename(config.run.state_dir)
        async with running_learner(config) as learner:
            sampler = await dial(learner.address, "eu-1", tmp_path / "s", first_digit)
            epochs.append((await sampler.follow()).target.decoded.learner_epoch)
            await sampler.close()
    assert epochs[0] < epochs[1] < epochs[2]


async def test_evaluation_gates_the_first_step_and_closes_the_run(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(
        tmp_path,
        policy_dir,
        run={"id": "test", "state_dir": tmp_path / "state", "steps": 2},
        data={"train": tmp_path / "train.jsonl", "eval": tmp_path / "train.jsonl"},
        eval={"at_start": True, "at_end": True, "prompts": 3, "temperature": 0.0},
    )
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "sampler", first_digit)
        await asyncio.gather(sampler.work(), learner.ended)
        await sampler.close()
    summary = json.loads((config.run.state_dir / "summary.json").read_text())
    assert 0 <= summary["accuracy_start"] <= 1.25
    assert 0 <= summary["accuracy_end"] <= 1.25
    assert not (config.run.state_dir / ADDRESS_NAME).exists()


async def test_online_mode_trains_only_groups_of_the_newest_version(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir, staleness={"max_staleness": 0})
    async with running_learner(config) as learner:
        sampler = await dial(learner.address, "eu-1", tmp_path / "sampler", first_digit)
        await sampler.work()
        await learner.ended
        await sampler.close()
    summary = json.loads((config.run.state_dir / "summary.json").read_text())
    assert summary["staleness_histogram"] == {"0": 6}
    assert summary["final_version"] == 3


async def test_a_port_in_use_is_one_sentence(tmp_path: Path, policy_dir: Path) -> None:
    async with running_learner(small_config(tmp_path, policy_dir)) as learner:
        listen = {"address": learner.address, "insecure": True}
        other = small_config(tmp_path, policy_dir, listen=listen, run={"id": "b", "state_dir": tmp_path / "b"})
        with pytest.raises(ExceptionGroup) as caught:
            async with running_learner(other):
                pass
        error = explain(caught.value, get_logger("test"))
        assert isinstance(error, UnavailableError)
        assert error.exit_code == 69
        assert "in use" in str(error)


async def test_a_second_learner_on_one_state_dir_is_refused(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir)
    async with running_learner(config):
        with pytest.raises(ExceptionGroup) as caught:
            async with running_learner(config):
                pass
        assert "is in use by process" in str(explain(caught.value, get_logger("test")))


async def test_a_data_set_or_run_that_changed_is_refused_at_a_restart(tmp_path: Path, policy_dir: Path) -> None:
    config = small_config(tmp_path, policy_dir)
    async with running_learner(config) as learner:
        learner.process.request_drain("at once")
        await learner.ended
    config.data.train.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    with pytest.raises(ExceptionGroup) as caught:
        async with running_learner(config):
            pass
    assert "has changed since the checkpoint" in str(explain(caught.value, get_logger("test")))

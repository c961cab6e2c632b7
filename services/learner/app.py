"""The learner process.

    lock state_dir ─► bind ─► load policy ─► open journal ─► restore, or publish version 0 ─► serve ─► train
        ─► send samplers home ─► stop serving ─► export, summary ─► exit 0

A signal, or `Stop` of an operator, ends it after the step in progress, with a checkpoint and a summary; the same
command goes on from there.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from services.learner.admin_service import AdminService
from services.learner.checkpoint import Checkpoints, Position
from services.learner.config import LearnerConfig
from services.learner.control_service import Contact, ControlService
from services.learner.data_plane import DataPlane
from services.learner.data_settings import DataSettings
from services.learner.disk_room import DiskRoom
from services.learner.export import Provenance, export_policy
from services.learner.finishing import send_home
from services.learner.monitor_service import MonitorService
from services.learner.object_store import ObjectStore
from services.learner.plans import Planner
from services.learner.policy import load_policy
from services.learner.preflight import Inputs
from services.learner.publisher import Publisher, RunFacts
from services.learner.records import METRICS_NAME, SUMMARY_NAME, Records, write_summary
from services.learner.rollout_service import RolloutService
from services.learner.run_control import RunControl
from services.learner.run_loop import LoopParts, RunLoop
from services.learner.run_settings import run_settings, store_model_files
from services.learner.run_state import Activity, RunState
from services.learner.serving import LearnerServer, LearnerServices
from services.learner.settings_record import settings_of, tell_of_changes
from services.learner.status import Observed
from services.learner.telemetry import metrics_of
from services.learner.traffic import Traffic
from services.learner.trainer import Trainer, TrainerSettings
from services.learner.versions import VersionFiles
from services.learner.weight_service import WeightService
from services.runtime.errors import ConfigError
from services.runtime.files import atomic_write, locked_directory, storage_errors
from services.runtime.lifecycle import Process
from services.runtime.log import get_logger
from services.runtime.metrics import LoopCollector, metrics_served
from services.wire.convert import model_files_sha256
from services.wire.expiry import tell_of_expiry
from services.wire.signing import ManifestSigner
from services.wire.types import ROOT_IN_LAST_PART, RunSettings

ADDRESS_NAME = "address"
METRICS_ADDRESS_NAME = "metrics_address"

_log = get_logger("learner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """The assembled parts: what the loop trains with, and what the port serves from."""

    parts: LoopParts
    settings: RunSettings
    store: ObjectStore
    observed: Observed


async def run_learner(process: Process, config: LearnerConfig, inputs: Inputs) -> None:
    """*Consumes* the configuration; *waits for* samplers; *produces* a trained policy in state_dir; *on cancel* the run
    goes on from its last checkpoint. Raises HeteroRLError."""
    state_dir = config.run.state_dir
    state = RunState()
    with locked_directory(state_dir):
        server = LearnerServer(inputs.address, inputs.credentials, config.listen.max_connections)
        _forget_addresses(state_dir)  # of a learner that was killed
        learner = await assemble(process, config, inputs, state)
        parts, plane = learner.parts, learner.parts.plane
        intake = process.tasks.create_task(plane.run())
        beside = [
            process.tasks.create_task(server.show(plane.room)),
            process.tasks.create_task(tell_of_expiry(config.tls, rotates=True)),
        ]
        drain = asyncio.Event()
        loop = RunLoop(parts)
        collector = LoopCollector(lambda: metrics_of(learner.observed.status()), asyncio.get_running_loop())
        async with AsyncExitStack() as ports:
            # Before anybody is served: a port in use ends the start, and no run that has begun.
            scraped = ports.enter_context(metrics_served(config.listen.metrics_address, collector))
            await ports.enter_async_context(server.serving(_services(config, learner, drain), plane.sessions, drain))
            atomic_write(state_dir / ADDRESS_NAME, f"{server.address}\n".encode())
            if scraped is not None:
                atomic_write(state_dir / METRICS_ADDRESS_NAME, f"{scraped}\n".encode())
            process.say(f"learner listens on {server.address}")
            process.ready(f"serving run {config.run.id} on {server.address}")
            await loop.run()
            state.switch(Activity.FINISH)
            if loop.finished or parts.control.asked:
                final_root = parts.publisher.latest.version.root
                await send_home(plane, final_root, config.lease.heartbeat_s)
        for task in beside:
            task.cancel()
        _forget_addresses(state_dir)
        await plane.flush()
        if loop.finished:
            await asyncio.to_thread(_export, learner)
        write_summary(state_dir / SUMMARY_NAME, learner.observed.summary())
        intake.cancel()
        await asyncio.gather(intake, return_exceptions=True)
        await plane.close()
        _log.info("learner_ended", step=state.step, finished=loop.finished)


async def assemble(process: Process, config: LearnerConfig, inputs: Inputs, state: RunState) -> Learner:
    """Loads, opens and restores everything; when it returns, a version is published and leases may be granted."""
    state_dir = config.run.state_dir
    state.settings = settings_of(config)
    policy = await asyncio.to_thread(load_policy, config.policy, config.data.system_prompt)
    # From the model directory again: a run that goes on from a checkpoint keeps the reference it began with.
    reference = await asyncio.to_thread(load_policy, config.policy) if config.loss.wants_reference else None
    checkpoints = Checkpoints(state_dir / "checkpoints", config.checkpoint.keep)
    if checkpoints.steps() and not config.run.resume:
        raise ConfigError(f"{state_dir} holds checkpoints and run.resume is false: set another run.state_dir")
    store = ObjectStore(state_dir / "objects")
    files = await asyncio.to_thread(store_model_files, policy, store)
    signer = ManifestSigner.load_or_create(state_dir / "manifest-key.pem") if config.publish.sign else None
    versions = VersionFiles(state_dir / "versions")
    plane = await DataPlane.open(
        state_dir,
        DataSettings.of(config, policy.vocab_size),
        inputs.train,
        room=DiskRoom(process.drain),
        known_epoch=_known_epoch(versions),
    )
    publisher = Publisher(
        store=store,
        versions=versions,
        facts=RunFacts(
            run_id=config.run.id, learner_epoch=plane.learner_epoch, model_files_sha256=model_files_sha256(files)
        ),
        signer=signer,
        settings=config.publish,
        root_last=partial(plane.sessions.all_can, ROOT_IN_LAST_PART),
    )
    traffic = Traffic(config.publish.max_mbit_s)
    parts = LoopParts(
        config=config,
        policy=policy,
        trainer=Trainer(policy, _trainer_settings(config), reference),
        plane=plane,
        publisher=publisher,
        planner=Planner(
            store=store, versions=versions, publisher=publisher, settings=config.publish, run_id=config.run.id
        ),
        checkpoints=checkpoints,
        traffic=traffic,
        state=state,
        records=Records(state_dir / METRICS_NAME),
        control=RunControl(process.drain, process.request_drain),
        eval_prompts=inputs.eval_prompts,
        model_objects=frozenset(file.object.object_id for file in files),
    )
    await _restore(parts, versions)
    return Learner(
        parts=parts,
        settings=run_settings(config, files, policy, signer.public_key if signer else b""),
        store=store,
        observed=Observed(config=config, state=state, plane=plane, publisher=publisher, traffic=traffic),
    )


def _known_epoch(versions: VersionFiles) -> int:
    """The clock's seconds, or what the versions here know, if that is more. A folder put back from a backup forgot
    starts that samplers and relays remember: counting on from there would give leases and plans a second meaning."""
    return max([int(time.time()), *(row.manifest.decoded.learner_epoch for row in versions.rows.values())])


async def _restore(parts: LoopParts, versions: VersionFiles) -> None:
    """From the newest checkpoint, or to the start of the run."""
    position = await asyncio.to_thread(parts.checkpoints.restore, parts.policy, parts.trainer)
    weights = await asyncio.to_thread(parts.policy.wire_weights)
    version, state = 0, None
    if position is None and (lost := max(versions.rows, default=0)):
        _log.warning("no_checkpoint", steps_taken_again=lost)
    if position is not None:
        version, state = position.version, cast("Mapping[str, int | str]", position.data)
        _restore_counters(parts, position)
    # Without a checkpoint the first evaluation is made again too.
    parts.state.add_evals(parts.records.rewind_to(-1 if position is None else version))
    await parts.plane.restore(state)
    if position is not None:
        await parts.publisher.restore(version, weights, position.root)
        _log.info("run_restored", step=position.step, root=position.root[:12])
    elif 0 in versions.rows:  # an earlier start ended before its first checkpoint
        await parts.publisher.restore(0, weights, versions.rows[0].root)
    else:
        await parts.publisher.publish(0, weights)
    parts.trainer.published(version, weights)
    await parts.plane.advance(version, parts.publisher.latest.version.root)


def _restore_counters(parts: LoopParts, position: Position) -> None:
    state = cast("Mapping[str, object]", position.counters["state"])
    tell_of_changes(cast("Mapping[str, object]", state.get("settings", {})), parts.state.settings)
    parts.state.restore(position.step, state)
    parts.traffic.restore(cast("dict[str, list[int]]", position.counters["traffic"]))


def _trainer_settings(config: LearnerConfig) -> TrainerSettings:
    return TrainerSettings(
        optimizer=config.optimizer,
        loss=config.loss,
        temperature=config.sampling.temperature,
        micro_batch_tokens=config.batch.micro_batch_tokens,
        autocast=config.policy.dtype == "bfloat16",
        recompute_versions=config.staleness.max_staleness + 1 if config.batch.recompute_logprobs else 0,
    )


def _services(config: LearnerConfig, learner: Learner, drain: asyncio.Event) -> LearnerServices:
    parts = learner.parts
    contact = Contact(heartbeat_s=config.lease.heartbeat_s, session_ttl_s=config.lease.session_ttl_s)
    return LearnerServices(
        control=ControlService(parts.plane, lambda: learner.settings, contact),
        weights=WeightService(
            run_id=config.run.id,
            publisher=parts.publisher,
            planner=parts.planner,
            store=learner.store,
            traffic=parts.traffic,
            drain=drain,
        ),
        rollouts=RolloutService(parts.plane, drain),
        monitor=MonitorService(learner.observed.status, parts.records, drain),
        admin=AdminService(parts.plane.sessions, parts.control, parts.plane.leases.wake),
    )


def _forget_addresses(state_dir: Path) -> None:
    with storage_errors(f"use folder {state_dir}"):
        for name in (ADDRESS_NAME, METRICS_ADDRESS_NAME):
            (state_dir / name).unlink(missing_ok=True)


def _export(learner: Learner) -> None:
    parts = learner.parts
    config, state = parts.config, parts.state
    newest = parts.publisher.latest
    evals = state.evals
    export_policy(
        config.run.policy_dir,
        parts.policy,
        newest.weights,
        Provenance(
            run_id=config.run.id,
            base_model=Path(config.policy.path).resolve().name,
            loss=config.loss.name.value,
            steps=state.step,
            version=newest.version.number,
            root=newest.version.root,
            accuracy_start=evals[0].accuracy if evals else None,
            accuracy_end=evals[-1].accuracy if evals else None,
        ),
    )

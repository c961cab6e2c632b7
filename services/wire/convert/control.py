"""Run settings, leases and reports."""

import math
from collections.abc import Sequence
from itertools import islice

from heterorl.v1 import control_pb2, types_pb2
from services.runtime.errors import BadInputError
from services.wire import types as t
from services.wire.convert.shared import enum_of, from_object, to_object, to_session

_MOST_CHARACTERS = 128
_MOST_REASONS = 64
"""What a sampler says of itself is kept and shown with that of all others, in one message: a status."""
_MOST_LEASES = 1 << 14
"""A message of 4 MiB can name two million, which would hold up everybody else for seconds."""


def to_sampling(settings: t.SamplingSettings) -> types_pb2.SamplingSettings:
    return types_pb2.SamplingSettings(
        temperature=settings.temperature,
        max_completion_tokens=settings.max_completion_tokens,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop=settings.stop,
    )


def from_sampling(message: types_pb2.SamplingSettings) -> t.SamplingSettings:
    return t.SamplingSettings(
        temperature=message.temperature,
        max_completion_tokens=message.max_completion_tokens,
        top_p=message.top_p,
        top_k=message.top_k,
        stop=tuple(message.stop),
    )


def to_grader(spec: t.GraderSpec) -> types_pb2.GraderSpec:
    return types_pb2.GraderSpec(name=spec.name, weight=spec.weight, options_json=spec.options_json)


def from_grader(message: types_pb2.GraderSpec) -> t.GraderSpec:
    return t.GraderSpec(name=message.name, weight=message.weight, options_json=message.options_json)


def to_run_settings(settings: t.RunSettings) -> control_pb2.RunSettings:
    return control_pb2.RunSettings(
        model_files=[types_pb2.ModelFile(name=f.name, object=to_object(f.object)) for f in settings.model_files],
        model_files_sha256=settings.model_files_sha256,
        vocab_size=settings.vocab_size,
        weights_dtype=settings.weights_dtype,
        group_size=settings.group_size,
        max_staleness=settings.max_staleness,
        max_prompt_tokens=settings.max_prompt_tokens,
        sampling=to_sampling(settings.sampling),
        eval_sampling=to_sampling(settings.eval_sampling),
        graders=[to_grader(spec) for spec in settings.graders],
        system_prompt=settings.system_prompt,
        manifest_public_key=settings.manifest_public_key,
    )


def from_run_settings(message: control_pb2.RunSettings) -> t.RunSettings:
    """Raises BadInputError also for a model file name that is not a plain file name: it becomes a path."""
    for file in message.model_files:
        name = file.name
        plain = name.isascii() and name.isprintable() and 0 < len(name) <= 128 and not name.startswith(".")
        if not plain or "/" in name or "\\" in name:
            raise BadInputError("a model file's name is not a plain file name; the learner is damaged or hostile")
    return t.RunSettings(
        model_files=tuple(t.ModelFile(name=f.name, object=from_object(f.object)) for f in message.model_files),
        model_files_sha256=message.model_files_sha256,
        vocab_size=message.vocab_size,
        weights_dtype=message.weights_dtype,
        group_size=message.group_size,
        max_staleness=message.max_staleness,
        max_prompt_tokens=message.max_prompt_tokens,
        sampling=from_sampling(message.sampling),
        eval_sampling=from_sampling(message.eval_sampling),
        graders=tuple(from_grader(spec) for spec in message.graders),
        system_prompt=message.system_prompt,
        manifest_public_key=message.manifest_public_key,
    )


def to_lease(lease: t.Lease) -> control_pb2.Lease:
    prompt = lease.prompt
    return control_pb2.Lease(
        lease_id=lease.lease_id,
        ttl_ms=lease.ttl_ms,
        prompt=control_pb2.Prompt(
            prompt_id=prompt.prompt_id,
            text=prompt.text,
            answer=prompt.answer,
            metadata_json=prompt.metadata_json,
        ),
        group_size=lease.group_size,
        purpose=types_pb2.LeasePurpose.ValueType(lease.purpose.value),
        min_policy_version=lease.min_policy_version,
        seed=lease.seed,
        eval_round=lease.eval_round,
    )


def from_lease(message: control_pb2.Lease) -> t.Lease:
    prompt = message.prompt
    return t.Lease(
        lease_id=message.lease_id,
        ttl_ms=message.ttl_ms,
        prompt=t.Prompt(
            prompt_id=prompt.prompt_id,
            text=prompt.text,
            answer=prompt.answer,
            metadata_json=prompt.metadata_json,
        ),
        group_size=message.group_size,
        purpose=enum_of(t.LeasePurpose, message.purpose),
        min_policy_version=message.min_policy_version,
        seed=message.seed,
        eval_round=message.eval_round,
    )


def to_engine(engine: t.EngineInfo | None) -> control_pb2.EngineInfo | None:
    if engine is None:
        return None
    return control_pb2.EngineInfo(kind=engine.kind, version=engine.version, device=engine.device, dtype=engine.dtype)


def from_engine(message: control_pb2.EngineInfo) -> t.EngineInfo:
    return t.EngineInfo(
        kind=message.kind[:_MOST_CHARACTERS],
        version=message.version[:_MOST_CHARACTERS],
        device=message.device[:_MOST_CHARACTERS],
        dtype=message.dtype[:_MOST_CHARACTERS],
    )


def to_heartbeat(session: t.Session, report: t.SamplerReport) -> control_pb2.HeartbeatRequest:
    fetch = report.fetch
    return control_pb2.HeartbeatRequest(
        session=to_session(session),
        state=types_pb2.SamplerState.ValueType(report.state.value),
        policy_version=report.policy_version,
        policy_root=report.policy_root,
        lease_ids=report.lease_ids,
        spool_groups=report.spool_groups,
        spool_bytes=report.spool_bytes,
        groups_total=report.groups_total,
        tokens_total=report.tokens_total,
        weights_bytes_received=report.weights_bytes_received,
        tokens_per_s=report.tokens_per_s,
        fetch=None
        if fetch is None
        else control_pb2.FetchProgress(
            target_version=fetch.target_version,
            bytes_done=fetch.bytes_done,
            bytes_total=fetch.bytes_total,
            bytes_per_s=fetch.bytes_per_s,
        ),
        last_swap_pause_ms=report.last_swap_pause_ms,
        engine_restarts=report.engine_restarts,
        grader_restarts=report.grader_restarts,
        groups_dropped=report.groups_dropped,
        engine=to_engine(report.engine),
    )


def from_lease_ids(lease_ids: Sequence[str]) -> tuple[str, ...]:
    if len(lease_ids) > _MOST_LEASES:
        raise BadInputError(f"a call names at most {_MOST_LEASES} leases, not {len(lease_ids)}")
    return tuple(lease_ids)


def _measured(value: float) -> float:
    """What cannot have been measured counts as 0: a sum over all samplers must stay a number."""
    return value if math.isfinite(value) and value > 0 else 0.0


def from_heartbeat(message: control_pb2.HeartbeatRequest) -> t.SamplerReport:
    fetch = message.fetch
    return t.SamplerReport(
        state=enum_of(t.SamplerState, message.state),
        policy_version=message.policy_version,
        policy_root=message.policy_root[:_MOST_CHARACTERS],
        lease_ids=from_lease_ids(message.lease_ids),
        spool_groups=message.spool_groups,
        spool_bytes=message.spool_bytes,
        groups_total=message.groups_total,
        tokens_total=message.tokens_total,
        weights_bytes_received=message.weights_bytes_received,
        tokens_per_s=_measured(message.tokens_per_s),
        fetch=t.FetchProgress(
            target_version=fetch.target_version,
            bytes_done=fetch.bytes_done,
            bytes_total=fetch.bytes_total,
            bytes_per_s=_measured(fetch.bytes_per_s),
        )
        if message.HasField("fetch")
        else None,
        last_swap_pause_ms=_measured(message.last_swap_pause_ms),
        engine_restarts=message.engine_restarts,
        grader_restarts=message.grader_restarts,
        groups_dropped={
            "".join(filter(str.isprintable, reason[:_MOST_CHARACTERS])): count
            for reason, count in islice(message.groups_dropped.items(), _MOST_REASONS)
        },
        engine=from_engine(message.engine) if message.HasField("engine") else None,
    )

"""Manifests, announcements and plans."""

from heterorl.v1 import weights_pb2
from services.runtime.errors import BadInputError, CorruptObjectError
from services.wire import types as t
from services.wire.convert.shared import enum_of, from_objects, parse, to_object


def encode_manifest(manifest: t.Manifest) -> bytes:
    """The bytes to sign and to keep."""
    return weights_pb2.Manifest(
        run_id=manifest.run_id,
        learner_epoch=manifest.learner_epoch,
        version=manifest.version,
        root=manifest.root,
        parent_root=manifest.parent_root,
        full_bytes=manifest.full_bytes,
        parameters=manifest.parameters,
        changed=manifest.changed,
        model_files_sha256=manifest.model_files_sha256,
        published_unix_ms=manifest.published_unix_ms,
        update_bytes=manifest.update_bytes,
    ).SerializeToString()


def decode_manifest(data: bytes) -> t.Manifest:
    message = parse(weights_pb2.Manifest(), data, "manifest")
    return t.Manifest(
        run_id=message.run_id,
        learner_epoch=message.learner_epoch,
        version=message.version,
        root=message.root,
        parent_root=message.parent_root,
        full_bytes=message.full_bytes,
        parameters=message.parameters,
        changed=message.changed,
        model_files_sha256=message.model_files_sha256,
        published_unix_ms=message.published_unix_ms,
        update_bytes=message.update_bytes,
    )


def to_signed(manifest: t.SignedManifest) -> weights_pb2.SignedManifest:
    return weights_pb2.SignedManifest(manifest=manifest.manifest, signature=manifest.signature)


def from_signed(message: weights_pb2.SignedManifest) -> t.SignedManifest:
    """Decodes; the caller checks the signature before it believes `decoded`."""
    return t.SignedManifest(
        manifest=message.manifest, signature=message.signature, decoded=decode_manifest(message.manifest)
    )


def to_announcement(announcement: t.Announcement) -> weights_pb2.WatchPolicyResponse:
    update, coming = announcement.update, announcement.coming
    return weights_pb2.WatchPolicyResponse(
        manifest=to_signed(announcement.manifest),
        update=None if update is None else _to_step(update),
        coming=None if coming is None else _to_coming(coming),
    )


def from_announcement(message: weights_pb2.WatchPolicyResponse) -> t.Announcement:
    """An update that is not what the manifest says of it is left out: the plan for that version is asked for. So is a
    coming one that cannot be: it will be announced when it is made."""
    manifest = from_signed(message.manifest)
    try:
        update = _from_step(message.update) if message.HasField("update") else None
    except BadInputError:
        update = None
    if update is not None and not _may_be_of(update, manifest.decoded):
        update = None
    try:
        coming = _from_coming(message.coming) if message.HasField("coming") else None
    except BadInputError:
        coming = None
    return t.Announcement(manifest=manifest, update=update, coming=coming)


def _may_be_of(update: t.PlanStep, manifest: t.Manifest) -> bool:
    """Whether it leads to the version in as many bytes as the manifest says; a claim of any size ends here."""
    size_bytes = sum(ref.size_bytes for ref in update.objects)
    whole = size_bytes == manifest.update_bytes and all(ref.size_bytes for ref in update.objects)
    return update.target_root == manifest.root and bool(update.objects) and whole


def to_plan(plan: t.Plan) -> weights_pb2.GetPlanResponse:
    return weights_pb2.GetPlanResponse(
        target=to_signed(plan.target), steps=[_to_step(step) for step in plan.steps], total_bytes=plan.total_bytes
    )


def from_plan(message: weights_pb2.GetPlanResponse) -> t.Plan:
    """Raises CorruptObjectError too, for a plan of more bytes than any way to weights of that size: a keyframe is one,
    and a claim of any size would fill the disk of whoever believes it."""
    plan = t.Plan(target=from_signed(message.target), steps=tuple(_from_step(step) for step in message.steps))
    if plan.total_bytes > 2 * plan.target.decoded.full_bytes + t.TABLES_BYTES:
        raise CorruptObjectError(
            f"a plan of {plan.total_bytes} bytes leads to weights of {plan.target.decoded.full_bytes}: "
            "a keyframe is fetched"
        )
    return plan


def _to_step(step: t.PlanStep) -> weights_pb2.PlanStep:
    return weights_pb2.PlanStep(
        kind=weights_pb2.UpdateKind.ValueType(step.kind.value),
        base_root=step.base_root,
        target_root=step.target_root,
        target_version=step.target_version,
        objects=[to_object(ref) for ref in step.objects],
    )


def _to_coming(coming: t.Coming) -> weights_pb2.ComingUpdate:
    return weights_pb2.ComingUpdate(
        base_root=coming.base_root,
        target_root=coming.target_root,
        target_version=coming.target_version,
        first=coming.first,
        objects=[to_object(ref) for ref in coming.objects],
    )


def _from_coming(message: weights_pb2.ComingUpdate) -> t.Coming:
    if not all(ref.size_bytes for ref in message.objects):
        raise BadInputError("an update has no objects without bytes")
    return t.Coming(
        base_root=message.base_root,
        target_root=message.target_root,
        target_version=message.target_version,
        first=message.first,
        objects=from_objects(message.objects),
    )


def _from_step(message: weights_pb2.PlanStep) -> t.PlanStep:
    return t.PlanStep(
        kind=enum_of(t.UpdateKind, message.kind),
        base_root=message.base_root,
        target_root=message.target_root,
        target_version=message.target_version,
        objects=from_objects(message.objects),
    )

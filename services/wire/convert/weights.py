"""Manifests and plans."""

from heterorl.v1 import weights_pb2
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


def to_plan(plan: t.Plan) -> weights_pb2.GetPlanResponse:
    return weights_pb2.GetPlanResponse(
        target=to_signed(plan.target),
        steps=[
            weights_pb2.PlanStep(
                kind=weights_pb2.UpdateKind.ValueType(step.kind.value),
                base_root=step.base_root,
                target_root=step.target_root,
                target_version=step.target_version,
                objects=[to_object(ref) for ref in step.objects],
            )
            for step in plan.steps
        ],
        total_bytes=plan.total_bytes,
    )


def from_plan(message: weights_pb2.GetPlanResponse) -> t.Plan:
    return t.Plan(
        target=from_signed(message.target),
        steps=tuple(
            t.PlanStep(
                kind=enum_of(t.UpdateKind, step.kind),
                base_root=step.base_root,
                target_root=step.target_root,
                target_version=step.target_version,
                objects=from_objects(step.objects),
            )
            for step in message.steps
        ),
    )

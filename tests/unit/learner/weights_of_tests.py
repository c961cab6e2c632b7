"""Small weights as bits, and a publisher with its store, for tests."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.learner.config import PublishSection
from services.learner.object_store import ObjectStore
from services.learner.plans import Planner
from services.learner.publisher import Publisher, RunFacts
from services.learner.versions import VersionFiles
from services.wire.delta import BitTensor, Weights, apply_update
from services.wire.types import Plan, UpdateKind


def make_weights(seed: int, elements: int = 20_000) -> dict[str, BitTensor]:
    """Two bf16 tensors of random bits that are finite numbers."""
    draws = np.random.default_rng(seed)
    bits = draws.integers(0x3000, 0x3F80, elements, dtype=np.uint16)
    return {
        "a.weight": BitTensor(dtype="BF16", shape=(elements // 2,), bits=bits[: elements // 2].copy()),
        "b.weight": BitTensor(dtype="BF16", shape=(elements - elements // 2,), bits=bits[elements // 2 :].copy()),
    }


def nudged(weights: Weights, seed: int, changes: int = 200) -> dict[str, BitTensor]:
    """The same with some elements one step up."""
    draws = np.random.default_rng(seed)
    result: dict[str, BitTensor] = {}
    for name, tensor in weights.items():
        bits = tensor.bits.copy()
        bits[draws.choice(bits.size, changes, replace=False)] += np.uint16(1)
        result[name] = BitTensor(dtype=tensor.dtype, shape=tensor.shape, bits=bits)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """Everything that publishes."""

    store: ObjectStore
    versions: VersionFiles
    publisher: Publisher
    planner: Planner
    now_s: list[float]
    """The store's clock: [seconds]."""


def open_shop(folder: Path, epoch: int = 1, root_last: bool = True, **settings: object) -> Shop:
    """On `folder`, as a learner's start opens it."""
    now_s = [0.0]
    section = PublishSection.model_validate({"workers": 1, **settings})
    store = ObjectStore(folder / "objects", clock=lambda: now_s[0])
    versions = VersionFiles(folder / "versions")
    facts = RunFacts(run_id="test", learner_epoch=epoch, model_files_sha256="0" * 64)
    publisher = Publisher(
        store=store,
        versions=versions,
        facts=facts,
        signer=None,
        settings=section,
        root_last=lambda: root_last,
        unix_ms=lambda: 1,
    )
    planner = Planner(store=store, versions=versions, publisher=publisher, settings=section, run_id="test")
    return Shop(store=store, versions=versions, publisher=publisher, planner=planner, now_s=now_s)


def carry_out(shop: Shop, plan: Plan, weights: Weights | None) -> Weights | None:
    """What a receiver does with a plan."""
    for step in plan.steps:
        parts = [shop.store.path_of(ref.object_id) for ref in step.objects]
        base = None if step.kind is UpdateKind.KEYFRAME else weights
        weights = apply_update(parts, base, expect_root=step.target_root)
    return weights

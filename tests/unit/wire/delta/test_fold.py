"""Squashed deltas do what the single ones did one after another, without the weights."""

from itertools import pairwise

import numpy as np
import pytest

from services.runtime.errors import CorruptObjectError, InvalidWeightsError
from services.wire.delta import BitTensor, EncodedUpdate, apply_update, encode_delta, fold, root_of
from services.wire.delta import layout as layout_module
from tests.unit.wire.delta.samples import edited, model, nudged, same

Policy = dict[str, BitTensor]


def history(densities: list[float], codec: str = "sx") -> tuple[list[Policy], list[EncodedUpdate]]:
    """Versions 0 to n, and the delta between each and the next."""
    rng = np.random.default_rng(0)
    versions = [model(rng)]
    for density in densities:
        versions.append(nudged(rng, versions[-1], density))
    deltas = [
        encode_delta(old, new, run_id="run", base_version=number, target_version=number + 1, codec=codec)
        for number, (old, new) in enumerate(pairwise(versions))
    ]
    return versions, deltas


@pytest.mark.parametrize(
    "densities",
    [[0.01], [0.01] * 8, [0.3, 0.3, 0.01], [0.01, 0.9], [0.9, 0.01, 0.3], [0.9, 0.9], [0.0, 0.02, 0.0]],
    ids=str,
)
def test_a_squashed_delta_reaches_the_last_version(densities: list[float]) -> None:
    versions, deltas = history(densities)
    squashed = fold([delta.parts for delta in deltas])
    assert same(apply_update(squashed.parts, versions[0], expect_root=root_of(versions[-1])), versions[-1])
    assert (squashed.info.base_version, squashed.info.target_version) == (0, len(densities))
    assert squashed.info.base_root == root_of(versions[0])


def test_a_squashed_delta_is_smaller_than_the_single_ones() -> None:
    _, deltas = history([0.01] * 16)
    assert fold([delta.parts for delta in deltas]).info.bytes < 0.5 * sum(delta.info.bytes for delta in deltas)


def test_a_squashed_delta_is_the_delta_that_the_ends_would_make() -> None:
    versions, deltas = history([0.01] * 4)
    direct = encode_delta(versions[0], versions[-1], run_id="run", base_version=0, target_version=4)
    assert fold([delta.parts for delta in deltas]).parts == direct.parts


def test_changes_that_are_taken_back_fall_out() -> None:
    versions, (there,) = history([0.2])
    back = encode_delta(versions[1], versions[0], run_id="run", base_version=1, target_version=2)
    squashed = fold([there.parts, back.parts])
    assert squashed.info.changed == 0
    assert same(apply_update(squashed.parts, versions[0]), versions[0])


def test_deltas_of_many_parts_fold_in_whatever_order_their_parts_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 4096)
    versions, deltas = history([0.02, 0.02])
    squashed = fold([deltas[0].parts, tuple(reversed(deltas[1].parts))])
    assert squashed.info.shards == deltas[0].info.shards > 3
    assert same(apply_update(squashed.parts, versions[0]), versions[2])


def test_a_squashed_delta_folds_again() -> None:
    versions, deltas = history([0.01] * 4)
    halves = [fold([delta.parts for delta in deltas[start : start + 2]]).parts for start in (0, 2)]
    assert same(apply_update(fold(halves).parts, versions[0]), versions[4])


def test_deltas_that_do_not_follow_each_other_are_refused() -> None:
    _, deltas = history([0.01] * 3)
    for wrong in ([deltas[0], deltas[2]], [deltas[1], deltas[0]], [deltas[0], deltas[0]]):
        with pytest.raises(InvalidWeightsError, match="does not follow"):
            fold([delta.parts for delta in wrong])
    with pytest.raises(InvalidWeightsError, match="no delta"):
        fold([])


def test_xc_deltas_and_damaged_ones_are_refused() -> None:
    _, conditioned = history([0.01, 0.01], "xc")
    with pytest.raises(InvalidWeightsError, match="only sx"):
        fold([delta.parts for delta in conditioned])
    _, deltas = history([0.01, 0.01])
    with pytest.raises(CorruptObjectError):
        fold([deltas[0].parts, (deltas[1].parts[0][:-1],)])

    def emptied(blocks: dict[str, bytes]) -> None:
        blocks[next(name for name in blocks if "@" in name)] = b""

    with pytest.raises(CorruptObjectError):
        fold([deltas[0].parts, (edited(deltas[1].parts[0], entries=emptied), *deltas[1].parts[1:])])

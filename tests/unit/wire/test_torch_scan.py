"""The device's path of the encoder, run on CPU tensors: the same bytes as the host's path. Not run on a GPU here."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from services.wire import torch_scan
from services.wire.delta import BitTensor, Codec, apply_update, iter_encode, layout, root_of
from services.wire.delta.exponents import EXPONENT_SHIFT, HostExponents
from services.wire.delta.sparse import scan
from services.wire.torch_bits import to_bits, to_torch
from services.wire.torch_scan import DeviceExponents, compare, comparison_of, device_bits, scan_on_device
from tests.unit.learner.weights_of_tests import open_shop
from tests.unit.wire.delta.samples import model, normal_bf16, nudged, same, tensor

DENSITIES = (0.0, 0.003, 0.05, 0.3, 0.8)


def on_device(weights: dict[str, BitTensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in to_torch(weights).items()}


@pytest.mark.parametrize(("codec", "density"), list(itertools.product((Codec.SX, Codec.XC), DENSITIES)))
def test_both_paths_make_the_same_bytes(codec: Codec, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_ELEMENTS", 3000)
    monkeypatch.setattr(torch_scan, "SCAN_ELEMENTS", 1700)
    rng = np.random.default_rng(1)
    base = model(rng)
    new = nudged(rng, base, density)
    names = list(base)
    # float32 tensors stay what they are: the cast is to_bits', and has a test of its own below.
    base_bits, new_bits = (
        {name: bits[name] for name in names}
        for bits in (
            {k: torch.from_numpy(v.bits.view(f"i{v.bits.dtype.itemsize}").copy()) for k, v in weights.items()}
            for weights in (base, new)
        )
    )
    comparison = comparison_of(base, base_bits, compare(base_bits, new_bits), workers=2)
    assert same(dict(comparison.new), new)
    facts = {"run_id": "r", "base_version": 0, "target_version": 1, "base_root": root_of(base), "codec": codec}
    host = list(iter_encode(base, new, **facts))  # type: ignore[arg-type]
    device = list(iter_encode(base, new, comparison=comparison, workers=2, **facts))  # type: ignore[arg-type]
    assert device == host
    assert same(apply_update(device, base), new)


def test_a_snapshot_on_the_device_is_cast_as_the_hosts_is() -> None:
    torch.manual_seed(0)
    state = {"a": torch.randn(50, 7), "t": torch.randn(7, 50).t(), "n": torch.tensor(3)}
    bits = device_bits(state, list(state), torch.bfloat16)
    for name, value in to_bits(state).items():
        assert np.array_equal(bits[name].numpy().view(value.bits.dtype), value.bits), name
        assert bits[name].data_ptr() != state[name].data_ptr()


@pytest.mark.parametrize("dtype", sorted(EXPONENT_SHIFT))
def test_exponents_and_ranks_are_the_hosts(dtype: str) -> None:
    rng = np.random.default_rng(2)
    size = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    values = rng.integers(0, 256, 5000 * size, dtype=np.uint8).view(f"u{size}")
    base = tensor(dtype, values).bits
    new = base.copy()
    new[rng.random(5000) < 0.05] += 1
    host = HostExponents(pieces=[base[:1234], base[1234:1235], base[1235:]], shift=EXPONENT_SHIFT[dtype])
    device = DeviceExponents.of(torch.from_numpy(base.view(f"i{size}").copy()), EXPONENT_SHIFT[dtype])
    changes = scan(base, new)
    assert np.array_equal(device.sampled(), host.sampled())
    exponents = host.at(changes.positions)
    assert np.array_equal(device.at(changes.positions), exponents)
    for limits in ([], [1], [4, 9, 30], [1, 2, 3, 4, 5, 6, 7, 8, 200]):
        for mine, theirs in zip(
            device.ranked(limits, changes, exponents), host.ranked(limits, changes, exponents), strict=True
        ):
            assert mine.count == theirs.count
            assert np.array_equal(mine.positions, theirs.positions)
            assert np.array_equal(mine.differences, theirs.differences)


def test_a_tensor_without_elements_and_one_without_changes_have_none() -> None:
    for elements in (0, 10):
        bits = torch.zeros(elements, dtype=torch.int16)
        found = scan_on_device(bits, bits.clone())
        assert (found.count, found.positions.size, found.differences.dtype) == (elements, 0, np.uint16)


async def test_the_publisher_takes_a_comparison_only_with_its_own_baseline(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    versions = [{"w": tensor("BF16", normal_bf16(rng, 4000))}]
    for _ in range(3):
        versions.append(nudged(rng, versions[-1], 0.01))
    shop = open_shop(tmp_path)
    await shop.publisher.publish(0, versions[0])
    bits = [{"w": torch.from_numpy(weights["w"].bits.view(np.int16).copy())} for weights in versions]
    first, stale = (comparison_of(versions[0], bits[0], compare(bits[0], bits[n])) for n in (1, 2))
    await shop.publisher.publish(1, first.new, first)
    await shop.publisher.publish(2, stale.new, stale)
    assert [row.root for row in shop.versions.rows.values()] == [root_of(weights) for weights in versions[:3]]
    weights: dict[str, BitTensor] | None = versions[0]
    for number in (1, 2):
        update = shop.versions.rows[number].update
        assert update is not None
        weights = apply_update([shop.store.path_of(ref.object_id) for ref in update.objects], weights)
        assert same(weights, versions[number])

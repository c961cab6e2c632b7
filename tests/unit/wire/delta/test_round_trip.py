"""Every bit comes back, in every type, at every density, through every codec."""

import itertools
import queue
from dataclasses import dataclass

import numpy as np
import pytest

from services.runtime.errors import InvalidWeightsError
from services.wire.delta import (
    BitTensor,
    Codec,
    UpdateKind,
    apply_update,
    encode_delta,
    encode_keyframe,
    inspect,
    iter_encode,
    root_of,
)
from services.wire.delta import layout as layout_module
from services.wire.delta.codec import HostComparison
from services.wire.delta.layout import Chunk
from services.wire.delta.sparse import Changes
from services.wire.delta.tensors import EXPONENT_MASK, ITEM_BYTES, RunningDigests, digest_of, update_with
from tests.unit.wire.delta.samples import model, normal_bf16, nudged, random_tensor, same, tensor

CODECS = [Codec.SX, Codec.XC]
SPECIAL_BF16 = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x0001, 0x8001, 0x007F, 0x7F7F, 0x3F80]


def delta_of(base: dict[str, BitTensor], new: dict[str, BitTensor], codec: Codec = Codec.SX, workers: int = 1):
    return encode_delta(base, new, run_id="run", base_version=3, target_version=4, codec=codec, workers=workers)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("density", [0.0, 0.003, 0.1, 0.3, 0.7, 1.0])
def test_every_dtype_comes_back_bit_for_bit_at_every_density(dtype: str, density: float, codec: Codec) -> None:
    rng = np.random.default_rng(1)
    base = {"w": random_tensor(rng, dtype, (50, 41)), "v": random_tensor(rng, dtype, (7,))}
    new = nudged(rng, base, density)
    update = delta_of(base, new, codec)
    assert same(apply_update(update.parts, base, expect_root=root_of(new)), new)


@pytest.mark.parametrize("codec", CODECS)
def test_every_pair_of_special_values_survives(codec: Codec) -> None:
    """-0, infinities, quiet and signalling NaN, denormals: each turning into each other."""
    before, after = np.meshgrid(SPECIAL_BF16, SPECIAL_BF16)
    base, new = {"w": tensor("BF16", before)}, {"w": tensor("BF16", after)}
    assert same(apply_update(delta_of(base, new, codec).parts, base), new)


def test_every_bf16_pattern_survives_a_keyframe_and_a_delta() -> None:
    every = np.arange(1 << 16)
    base, new = {"w": tensor("BF16", every)}, {"w": tensor("BF16", every[::-1])}
    assert same(apply_update(encode_keyframe(base, run_id="run", version=0).parts, None), base)
    assert same(apply_update(delta_of(base, new).parts, base), new)


@pytest.mark.parametrize("codec", CODECS)
def test_gaps_around_the_escape_byte_survive(codec: Codec) -> None:
    base = {"w": tensor("BF16", np.full(4000, 0x3C00))}
    positions = np.cumsum([0, 1, 254, 255, 256, 257, 509, 510, 511, 512, 766])
    bits = base["w"].bits.copy()
    bits[positions] += 1
    bits[-1] += 1
    new = {"w": tensor("BF16", bits)}
    assert same(apply_update(delta_of(base, new, codec).parts, base), new)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_a_policy_of_many_chunks_and_parts_comes_back(
    workers: int, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 8192)
    rng = np.random.default_rng(2)
    base = model(rng)
    new = nudged(rng, base, 0.02)
    update = delta_of(base, new, codec, workers)
    assert update.info.shards == len(update.parts) > 3
    assert same(apply_update(update.parts, base, workers=workers), new)
    keyframe = encode_keyframe(new, run_id="run", version=4, workers=workers)
    assert keyframe.info.target_root == update.info.target_root
    assert same(apply_update(keyframe.parts, None, workers=workers), new)
    assert same(apply_update(list(reversed(update.parts)), base, workers=workers), new)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Watched(HostComparison):
    """Tells which chunks an encoder has come to."""

    begun: "queue.SimpleQueue[str]"

    def changes(self, chunk: Chunk) -> Changes:
        self.begun.put(chunk.key)
        return HostComparison.changes(self, chunk)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_next_chunks_are_encoded_while_the_caller_does_something_with_a_part(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 20_000)
    rng = np.random.default_rng(7)
    base = {"w": tensor("BF16", normal_bf16(rng, 20_000))}
    new = nudged(rng, base, 0.02)
    begun: queue.SimpleQueue[str] = queue.SimpleQueue()
    parts = iter_encode(
        base,
        new,
        run_id="run",
        base_version=3,
        target_version=4,
        workers=workers,
        comparison=Watched(base=base, new=new, begun=begun),
    )
    next(parts)
    ahead = 2 * workers
    assert {begun.get(timeout=30) for _ in range(5 + ahead)} == {f"w@{n * 1000}" for n in range(5 + ahead)}
    with pytest.raises(queue.Empty):  # and no more than these: their payloads are memory
        begun.get(timeout=0.05)
    assert len(list(parts)) == 3


def test_the_base_is_only_read() -> None:
    rng = np.random.default_rng(3)
    base = model(rng)
    before = {name: old.bits.copy() for name, old in base.items()}
    for old in base.values():
        old.bits.flags.writeable = False
    update = delta_of(base, nudged(rng, base, 0.2))
    result = apply_update(update.parts, base)
    assert all(np.array_equal(base[name].bits, bits) for name, bits in before.items())
    assert not any(np.shares_memory(result[name].bits, base[name].bits) for name in base)


def test_staging_memory_is_used_again_and_never_the_base() -> None:
    rng = np.random.default_rng(8)
    versions = [model(rng)]
    for _ in range(3):
        versions.append(nudged(rng, versions[-1], 0.1))
    staging = apply_update(delta_of(versions[0], versions[1]).parts, versions[0])
    update = delta_of(versions[1], versions[2])
    result = apply_update(update.parts, versions[1], staging=staging)
    assert same(result, versions[2])
    assert all(result[name].bits is staging[name].bits for name in result)
    kept = apply_update(update.parts, versions[1], staging=versions[1])
    assert same(kept, versions[2])
    assert same(apply_update(delta_of(versions[1], versions[3]).parts, versions[1]), versions[3]), "the base is whole"
    assert same(apply_update(update.parts, versions[1], staging={"other": tensor("BF16", [1])}), versions[2])


def test_nothing_changed_is_a_delta_without_chunks() -> None:
    base = model(np.random.default_rng(4))
    update = delta_of(base, base)
    assert update.info.changed == 0
    assert update.info.base_root == update.info.target_root
    assert same(apply_update(update.parts, base), base)


def test_the_info_counts_what_the_delta_holds() -> None:
    rng = np.random.default_rng(5)
    base = model(rng)
    new = nudged(rng, base, 0.05)
    info = inspect(delta_of(base, new).parts)
    assert info.kind is UpdateKind.DELTA
    assert info.changed == sum(int((base[name].bits != new[name].bits).sum()) for name in base)
    assert info.parameters == sum(old.bits.size for old in base.values())
    assert info.full_bytes == sum(old.nbytes for old in base.values())
    assert info.bytes == sum(map(len, delta_of(base, new).parts))
    assert (info.base_root, info.target_root) == (root_of(base), root_of(new))


def test_equal_weights_make_equal_bytes_whatever_the_number_of_workers() -> None:
    rng = np.random.default_rng(6)
    base = model(rng)
    new = nudged(rng, base, 0.05)
    assert delta_of(base, new, workers=1).parts == delta_of(base, new, workers=4).parts
    streamed = iter_encode(base, new, run_id="run", base_version=3, target_version=4)
    assert tuple(streamed) == delta_of(base, new).parts


def test_the_root_depends_on_name_type_shape_and_every_bit() -> None:
    weights = {"a": tensor("BF16", [1, 2, 3, 4], (2, 2))}
    others = [
        {"b": tensor("BF16", [1, 2, 3, 4], (2, 2))},
        {"a": tensor("F16", [1, 2, 3, 4], (2, 2))},
        {"a": tensor("BF16", [1, 2, 3, 4], (4,))},
        {"a": tensor("BF16", [1, 2, 3, 5], (2, 2))},
    ]
    assert len({root_of(weights), *map(root_of, others)}) == 5


def test_a_sparse_step_of_a_bf16_policy_is_small() -> None:
    rng = np.random.default_rng(7)
    base = {"w": tensor("BF16", normal_bf16(rng, 1 << 20))}
    update = delta_of(base, nudged(rng, base, 0.005))
    bits_per_change = 8 * update.info.bytes / update.info.changed
    assert bits_per_change < 14
    assert encode_keyframe(base, run_id="run", version=0).info.ratio > 1.45


def test_running_digests_are_those_of_the_whole_in_whatever_order_the_pieces_come() -> None:
    rng = np.random.default_rng(9)
    bits = normal_bf16(rng, 10_000)
    cuts = [(0, 3000), (3000, 3001), (3001, 10_000)]
    for order in itertools.permutations(cuts):
        running = RunningDigests()
        hashed = 0
        for start, stop in order:
            hasher = running.hasher_at("w", start)
            if hasher is not None:
                update_with(hasher, bits[start:stop])
                running.done("w", hasher, stop)
                hashed += stop - start
        assert running.of("w", bits) == digest_of(bits)
        assert hashed == (10_000 if order == tuple(cuts) else hashed) > 0
    assert RunningDigests().of("w", bits[:0]) == digest_of(bits[:0])


def test_exponent_masks_belong_to_known_types() -> None:
    assert EXPONENT_MASK.keys() <= ITEM_BYTES.keys()


@pytest.mark.parametrize("codec", ["keyframe", "zz"])
def test_a_delta_of_another_codec_is_refused(codec: str) -> None:
    weights = {"w": tensor("BF16", [1, 2])}
    with pytest.raises(InvalidWeightsError, match="sx or xc"):
        encode_delta(weights, weights, run_id="run", base_version=0, target_version=1, codec=codec)


def test_memory_that_tensors_share_is_not_decoded_into() -> None:
    """Staging that overlaps itself or the base would give wrong weights as verified."""
    base = {name: tensor("BF16", range(1000)) for name in ("x", "y")}
    new = {"x": tensor("BF16", range(1, 1001)), "y": tensor("BF16", range(2, 1002))}
    parts = delta_of(base, new).parts
    room = np.zeros(1500, np.uint16)

    def staged(x: np.ndarray, y: np.ndarray) -> dict[str, BitTensor]:
        return {name: BitTensor(dtype="BF16", shape=(1000,), bits=bits) for name, bits in (("x", x), ("y", y))}

    for staging in (
        staged(room[:1000], room[:1000]),
        staged(room[500:], room[:1000]),
        staged(base["y"].bits, base["x"].bits),
        staged(room[:1000], base["x"].bits),
    ):
        assert same(apply_update(parts, base, expect_root=root_of(new), staging=staging), new)
        assert root_of(base) == root_of({name: tensor("BF16", range(1000)) for name in ("x", "y")})
    apart = staged(np.zeros(1000, np.uint16), np.zeros(1000, np.uint16))
    assert apply_update(parts, base, staging=apart)["x"].bits is apart["x"].bits


def test_thousands_of_tensors_with_long_names_and_thousands_of_empty_ones_come_back() -> None:
    weights = {f"{'e' * 507}{number:05}": tensor("BF16", [], (0,)) for number in range(2100)}
    weights |= {f"{'t' * 507}{number:05}": tensor("BF16", [1]) for number in range(4096)}
    base, new = weights, {**weights, f"{'t' * 507}00000": tensor("BF16", [2])}
    update = delta_of(base, new)
    assert len(update.parts) == 3
    assert same(apply_update(update.parts, base, expect_root=root_of(new)), new)

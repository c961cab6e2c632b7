"""Decoding ahead of the last part: the same weights, or nothing."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.wire.delta import BitTensor, Codec, EncodedUpdate, codec, encode_delta, encode_keyframe, root_of
from services.wire.delta import early as early_module
from services.wire.delta import encode as encode_module
from services.wire.delta import layout as layout_module
from services.wire.delta.codec import Whole
from services.wire.delta.density import Split
from services.wire.delta.early import EarlyDecoder, copy_into
from services.wire.delta.layout import Chunk, PartLayout
from services.wire.delta.part import parse_part
from services.wire.delta.sparse import Changes
from services.wire.delta.tensors import ITEM_BYTES, Weights, digests_of, forms_of
from services.wire.delta.validate import BITS_OF_ONE, has_exploded, is_finite, largest_magnitude, may_follow
from tests.unit.wire.delta.samples import model, normal_bf16, nudged, same, tensor

Policy = dict[str, BitTensor]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layout_module, "PART_BYTES", 8192)


def delta_of(base: Policy, new: Policy, codec: Codec = Codec.SX, root_last: bool = False) -> EncodedUpdate:
    return encode_delta(base, new, run_id="run", base_version=1, target_version=2, codec=codec, root_last=root_last)


def copy_of(weights: Policy) -> Policy:
    return {name: BitTensor(dtype=old.dtype, shape=old.shape, bits=old.bits.copy()) for name, old in weights.items()}


def written(parts: tuple[bytes, ...], folder: Path) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    return paths


def decode(
    update: EncodedUpdate, paths: list[Path], base: Policy, staging: Policy, workers: int = 1, level: bool = False
) -> Policy | None:
    early = EarlyDecoder(
        base,
        staging,
        base_root=update.info.base_root or "",
        workers=workers,
        level=level,
    )
    try:
        for path in paths:
            early.add(path)
        return early.finish(update.info.target_root)
    finally:
        early.close()


@pytest.fixture
def versions() -> tuple[Policy, Policy]:
    """The second has values that pass as a policy's: one bit pattern up or down from the first's."""
    rng = np.random.default_rng(5)
    base = {name: one for name, one in model(rng).items() if name != "model.scale"}
    return base, {**nudged(rng, base, 0.0), "model.embed_tokens.weight": moved(rng, base["model.embed_tokens.weight"])}


def moved(rng: np.random.Generator, old: BitTensor) -> BitTensor:
    bits = old.bits + (rng.random(old.bits.size) < 0.1).astype(np.uint16)
    return BitTensor(dtype=old.dtype, shape=old.shape, bits=bits)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("codec", [Codec.SX, Codec.XC])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("level", [False, True])
@pytest.mark.parametrize("root_last", [False, True])
def test_parts_in_any_order_make_the_weights_in_the_old_memory(
    versions: tuple[Policy, Policy],
    codec: Codec,
    turned: bool,
    workers: int,
    level: bool,
    root_last: bool,
    tmp_path: Path,
) -> None:
    base, new = versions
    update = delta_of(base, new, codec, root_last)
    assert len(update.parts) > 3
    paths = written(update.parts, tmp_path)
    staging = copy_of(new)
    if level:
        assert copy_into(staging, base, workers)
    found = decode(update, paths[::-1] if turned else paths, base, staging, workers, level)
    assert found is not None
    assert same(found, new)
    assert root_of(found) == update.info.target_root
    assert all(found[name].bits is staging[name].bits for name in found)


def one_missing(paths: list[Path]) -> list[Path]:
    return paths[:-1]


def one_twice(paths: list[Path]) -> list[Path]:
    return [*paths, paths[0]]


def one_instead_of_another(paths: list[Path]) -> list[Path]:
    return [*paths[:-1], paths[0]]


def one_damaged(paths: list[Path]) -> list[Path]:
    data = bytearray(paths[1].read_bytes())
    data[-1] ^= 1
    paths[1].write_bytes(data)
    return paths


@pytest.mark.parametrize("fault", [one_missing, one_twice, one_instead_of_another, one_damaged])
def test_parts_that_are_not_the_update_make_nothing(
    versions: tuple[Policy, Policy], fault: Callable[[list[Path]], list[Path]], tmp_path: Path
) -> None:
    base, new = versions
    update = delta_of(base, new)
    assert decode(update, fault(written(update.parts, tmp_path)), base, copy_of(base)) is None


@pytest.mark.parametrize("level", [False, True])
def test_elements_that_were_not_written_yet_are_not_taken_for_those_that_came(
    level: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part leaves a hole in its tensor, where the true update changes nothing: what the second part writes
    there must be in the digest."""
    base = {"w": tensor("BF16", normal_bf16(np.random.default_rng(3), 3000))}
    new, forged = copy_of(base), copy_of(base)
    new["w"].bits[[5, 2500]] += 1
    forged["w"].bits[[5, 1500, 2500]] += 1
    monkeypatch.setattr(layout_module, "PART_BYTES", 12_000)
    (whole,) = layout_module.plan_parts(forms_of(base))
    first, hole, last = whole.chunks
    parts = [PartLayout(forms=whole.forms, chunks=chunks) for chunks in ((first, last), (hole,))]
    monkeypatch.setattr(encode_module, "plan_parts", lambda forms: parts)
    for target, accepted in ((new, True), (forged, False)):
        update = encode_delta(base, target, run_id="", base_version=1, target_version=2, digests=digests_of(new))
        found = decode(update, written(update.parts, tmp_path), base, copy_of(base), level=level)
        assert (found is not None and same(found, new)) == accepted
        assert accepted or found is None


def test_the_next_part_is_decoded_while_a_chunk_of_the_one_before_is(
    versions: tuple[Policy, Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = versions
    update = delta_of(base, new)
    slow = parse_part(update.parts[0]).layout.chunks[-1]
    next_keys = {chunk.key for chunk in parse_part(update.parts[1]).layout.chunks}
    came_to_next = threading.Event()
    in_time: list[bool] = []

    def decode_chunk(payload: memoryview, chunk: Chunk, base: Weights | None) -> Whole | Split | Changes:
        if chunk == slow:
            in_time.append(came_to_next.wait(30))
        elif chunk.key in next_keys:
            came_to_next.set()
        return codec.decode_chunk(payload, chunk, base)

    monkeypatch.setattr(early_module, "decode_chunk", decode_chunk)
    found = decode(update, written(update.parts, tmp_path), base, copy_of(base), workers=2)
    assert in_time == [True]
    assert found is not None
    assert same(found, new)


def test_once_it_is_closed_nothing_is_written(
    versions: tuple[Policy, Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, new = versions
    update = delta_of(base, new)
    begun, go_on = threading.Event(), threading.Event()
    decoded: list[str] = []

    def decode_chunk(payload: memoryview, chunk: Chunk, base: Weights | None) -> Whole | Split | Changes:
        begun.set()
        assert go_on.wait(30)
        decoded.append(chunk.key)
        return codec.decode_chunk(payload, chunk, base)

    monkeypatch.setattr(early_module, "decode_chunk", decode_chunk)
    root, staging = update.info.base_root or "", copy_of(base)
    early = EarlyDecoder(base, staging, base_root=root, workers=1)
    early.add(written(update.parts, tmp_path)[0])
    assert begun.wait(30)
    _, jobs = early._begun[-1]
    jobs[-1].add_done_callback(lambda _: go_on.set())  # when it is cancelled
    closing = threading.Thread(target=early.close)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    chunks = parse_part(update.parts[0]).layout.chunks
    assert decoded == [chunks[0].key]
    assert len(chunks) > 1


def test_a_base_with_one_wrong_bit_makes_nothing(versions: tuple[Policy, Policy], tmp_path: Path) -> None:
    base, new = versions
    update = delta_of(base, new)
    wrong = copy_of(base)
    wrong["model.layers.0.mlp.up_proj.weight"].bits[7] ^= 1
    assert decode(update, written(update.parts, tmp_path), wrong, copy_of(base)) is None


def test_an_update_of_another_base_or_target_or_model_or_kind_makes_nothing(
    versions: tuple[Policy, Policy], tmp_path: Path
) -> None:
    base, new = versions
    update = delta_of(base, new)
    for number, other in enumerate(
        (
            delta_of(new, base),
            delta_of(base, nudged(np.random.default_rng(1), new, 0.01)),
            encode_keyframe(new, run_id="run", version=2),
            delta_of({"a": tensor("BF16", [1, 2])}, {"a": tensor("BF16", [1, 3])}),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert decode(update, written(other.parts, folder), base, copy_of(base)) is None


@pytest.mark.parametrize("value", [0x7F80, 0x7FC0, 0x4F00], ids=["infinite", "nan", "exploded"])
def test_values_that_no_policy_may_have_make_nothing(
    versions: tuple[Policy, Policy], value: int, tmp_path: Path
) -> None:
    base, new = versions
    new = copy_of(new)
    new["model.embed_tokens.weight"].bits[11] = value
    update = delta_of(base, new)
    assert decode(update, written(update.parts, tmp_path), base, copy_of(base)) is None


@settings(max_examples=300)
@given(
    st.sampled_from(["BF16", "F16", "F32", "F8_E5M2", "F8_E4M3", "I16"]),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(range(0, 1 << 16, 61))), max_size=8),
    st.integers(0, 1 << 32),
)
def test_what_changed_tells_whether_a_tensor_may_follow(dtype: str, changes: list[tuple[int, int]], seed: int) -> None:
    size = ITEM_BYTES[dtype]
    base = tensor(dtype, np.random.default_rng(seed).integers(0, BITS_OF_ONE.get(dtype, 0x30) * 2, 8))
    new = copy_of({"w": base})["w"]
    for place, value in changes:
        new.bits[place] = value << 8 * (size - 2) if size > 1 else value & 0xFF
    assume(is_finite(base))
    peak = largest_magnitude(new.bits[new.bits != base.bits])
    assert may_follow(new, base, peak) == (is_finite(new) and not has_exploded(new, base))


def test_memory_that_is_said_to_be_a_copy_and_is_not_makes_nothing(
    versions: tuple[Policy, Policy], tmp_path: Path
) -> None:
    base, new = versions
    update = delta_of(base, new)
    staging = copy_of(base)
    staging["model.norm.weight"].bits[3] ^= 1
    assert decode(update, written(update.parts, tmp_path), base, staging, level=True) is None


def test_only_memory_of_its_own_is_made_a_copy(versions: tuple[Policy, Policy]) -> None:
    base, new = versions
    assert not copy_into(base, base, 2)
    assert not copy_into({"a": tensor("BF16", [1, 2])}, base, 2)
    staging = copy_of(new)
    assert copy_into(staging, base, 2)
    assert same(staging, base)


def test_memory_that_is_the_bases_or_cannot_be_written_or_is_of_another_model_is_left_alone(
    versions: tuple[Policy, Policy], tmp_path: Path
) -> None:
    base, new = versions
    update = delta_of(base, new)
    paths = written(update.parts, tmp_path)
    assert decode(update, paths, base, base) is None
    frozen = copy_of(base)
    frozen["model.norm.weight"].bits.flags.writeable = False
    assert decode(update, paths, base, frozen) is None
    assert decode(update, paths, base, {"a": tensor("BF16", normal_bf16(np.random.default_rng(1), 4))}) is None
    assert root_of(base) == update.info.base_root

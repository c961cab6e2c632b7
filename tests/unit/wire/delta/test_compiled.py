"""The compiled comparison finds what numpy's passes find, in whatever memory the weights lie."""

import logging
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.wire.delta import compiled
from services.wire.delta.sparse import gaps_of, positions_of, scan
from services.wire.delta.tensors import Bits


@pytest.fixture(scope="module", autouse=True)
def prepared() -> Iterator[None]:
    assert compiled.prepare()
    yield
    compiled._kernels = None


def changed(count: int, density: float, seed: int) -> tuple[Bits, Bits]:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 1 << 16, count, np.uint16)
    new = base.copy()
    places = np.flatnonzero(rng.random(count) < density)
    new[places] += rng.choice(np.array([1, 2, 255, 0x8000, 0xFFFF], np.uint16), places.size)
    return base, new


def found_by_numpy(base: Bits, new: Bits, offset: int) -> tuple[list[int], list[int]]:
    positions = np.flatnonzero(base != new)
    return list(positions + offset), list((new - base)[positions])


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 70_000),
    density=st.sampled_from([0.0, 1e-4, 0.007, 0.06, 0.07, 1.0]),
    offset=st.sampled_from([0, 5, 1 << 40]),
    seed=st.integers(0, 9),
)
def test_it_finds_what_numpy_finds(count: int, density: float, offset: int, seed: int) -> None:
    base, new = changed(count, density, seed)
    changes = scan(base, new, offset)
    assert (list(changes.positions), list(changes.differences)) == found_by_numpy(base, new, offset)
    assert changes.count == count
    assert changes.positions.dtype == np.int64
    assert changes.differences.dtype == np.uint16


def test_it_is_this_that_runs_on_sparse_changes() -> None:
    base, new = changed(40_000, 0.007, 1)
    assert compiled.find_changes(base, new, 0) is not None


@pytest.mark.parametrize("count", [0, 4, 16_384, 16_388, 3 * 16_384])
def test_blocks_end_anywhere(count: int) -> None:
    base, new = changed(count, 0.01, 2)
    new[-1:] = base[-1:] + np.uint16(1)
    assert list(scan(base, new).positions) == found_by_numpy(base, new, 0)[0]


def test_weights_that_may_only_be_read_are_compared() -> None:
    """Those of a mapped file."""
    base, new = changed(40_000, 0.007, 3)
    base.flags.writeable = new.flags.writeable = False
    found = compiled.find_changes(base, new, 0)
    assert found is not None
    assert list(found[0]) == found_by_numpy(base, new, 0)[0]


@pytest.mark.parametrize("skipped", [1, 2, 3])
def test_memory_that_no_word_starts_at_is_left_to_numpy(skipped: int) -> None:
    base, new = changed(40_000 + skipped, 0.007, 4)
    assert compiled.find_changes(base[skipped:], new[skipped:], 0) is None
    assert list(scan(base[skipped:], new[skipped:]).positions) == found_by_numpy(base[skipped:], new[skipped:], 0)[0]


def test_other_types_and_dense_changes_are_left_to_numpy() -> None:
    base, new = changed(160_000, 0.5, 5)
    assert compiled.find_changes(base, new, 0) is None
    words = base.view(np.uint32)
    assert compiled.find_changes(words, words.copy(), 0) is None
    assert compiled.find_changes(base[::2], base[::2], 0) is None


def test_a_machine_without_numba_goes_on_with_numpy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "heterorl")
    monkeypatch.setattr(compiled, "_kernels", None)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not compiled.prepare()
    assert "encoder_not_compiled" in caplog.messages
    base, new = changed(40_000, 0.007, 6)
    assert compiled.find_changes(base, new, 0) is None
    assert list(scan(base, new).positions) == found_by_numpy(base, new, 0)[0]


@pytest.mark.parametrize(
    "error", [RuntimeError("cannot cache function '_find': no locator"), EOFError("ran out of input")]
)
def test_code_that_cannot_be_kept_is_compiled_anew(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only installation and no home: numba finds no folder for its cache. Or what it finds there is damaged."""
    import numba

    whole = numba.njit

    def njit(*arguments: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)
    kernels = compiled._compiled(numba)
    base, new = changed(16_384, 0.007, 7)
    positions, differences = np.empty(20_000, np.int64), np.empty(20_000, np.uint16)
    found = kernels.find(base.view(np.uint64), new.view(np.uint64), 0, positions, differences)
    assert list(positions[:found]) == found_by_numpy(base, new, 0)[0]


@settings(max_examples=60, deadline=None)
@given(gaps=st.lists(st.sampled_from([0, 1, 7, 253, 254, 255, 256, 509, 510, 511, 765, 100_000]), max_size=50))
def test_gaps_become_the_bytes_that_numpy_makes_of_them(gaps: list[int]) -> None:
    positions = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    coded = gaps_of(positions)
    assert bytes(coded) == b"".join(b"\xff" * (gap // 255) + bytes((gap % 255,)) for gap in gaps)
    assert list(positions_of(coded, 1 << 40)) == list(positions)

"""Groups of elements by exponent: ranks and places agree with what sorting would say, whatever the sizes."""

from itertools import accumulate, pairwise

import numpy as np
import pytest

from services.wire.delta import members
from services.wire.delta.exponents import EXPONENT_SHIFT, HostExponents
from services.wire.delta.members import SAMPLE_STRIDE, Listed, groups_between
from tests.unit.wire.delta.samples import tensor

LIMITS = [[], [1], [255], [5, 9], list(range(1, 65)), [1, 255], list(range(100, 122)), [110, 118, 121]]


def exponents_like_weights(rng: np.random.Generator, count: int) -> np.ndarray:
    """Half as many with every step down, as in normal weights: the lowest are few enough to be looked at apart."""
    return np.clip(122 - rng.geometric(0.5, count), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 511, 512, 513, 40_000])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_ranks_and_places_are_those_of_sorting(count: int, limits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "SCAN_ELEMENTS", 1 << 14)
    rng = np.random.default_rng(count)
    for exponents in (rng.integers(0, 256, count).astype(np.uint8), exponents_like_weights(rng, count)):
        groups = groups_between(Listed(exponents=exponents), limits)
        elements = [
            np.flatnonzero((exponents >= low) & (exponents < high)) for low, high in pairwise([0, *limits, 256])
        ]
        assert groups.sizes == [mine.size for mine in elements]
        for share in (1.0, 0.3, 0.01, 0.0):
            chosen = [np.sort(rng.permutation(mine)[: int(np.ceil(share * mine.size))]) for mine in elements]
            edges = [0, *accumulate(mine.size for mine in chosen)]
            places = np.concatenate(chosen)
            ranks = groups.ranks(places, edges)
            expected = [np.searchsorted(mine, some) for mine, some in zip(elements, chosen, strict=True)]
            assert np.array_equal(ranks, np.concatenate(expected))
            assert np.array_equal(groups.positions(ranks, edges), places)


@pytest.mark.parametrize("dtype", sorted(EXPONENT_SHIFT))
def test_exponents_of_pieces_are_those_of_the_whole(dtype: str) -> None:
    rng = np.random.default_rng(0)
    width = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    bits = tensor(dtype, rng.integers(0, 256, 5000 * width, dtype=np.uint8).view(f"u{width}")).bits
    cuts = [0, 0, 1, 126, 127, 128, 2000, 5000]
    source = HostExponents(pieces=[bits[low:high] for low, high in pairwise(cuts)], shift=EXPONENT_SHIFT[dtype])
    mask = 31 if dtype == "F16" else 255
    expected = (bits >> bits.dtype.type(EXPONENT_SHIFT[dtype]) & bits.dtype.type(mask)).astype(np.uint8)
    assert source.size == 5000
    assert np.array_equal(source.sampled(), expected[::SAMPLE_STRIDE])
    places = np.sort(rng.permutation(5000)[:300])
    assert np.array_equal(source.at(places), expected[places])
    for first, count in ((0, 5000), (0, 1), (100, 100), (1999, 3001)):
        out = np.empty(count, np.uint8)
        source.read(first, out)
        assert np.array_equal(out, expected[first : first + count])

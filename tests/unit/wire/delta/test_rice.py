"""Rice codes come back, are as short as they should be, and refuse what no encoder writes before memory is spent."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.errors import CorruptObjectError
from services.wire.delta.rice import (
    LIMIT,
    Row,
    best_parameter,
    bits_of,
    gaps_between,
    pack_rows,
    parameter_of_gaps,
    positions_between,
    read_rows,
)
from services.wire.delta.streams import StreamReader, pack_planes, varint

MUCH = 1 << 30


def row(numbers: list[int] | np.ndarray, k: int) -> Row:
    return Row(numbers=np.asarray(numbers, np.uint32), k=k)


def reader_of(payload: bytes) -> StreamReader:
    return StreamReader(memoryview(payload))


def unpacked(rows: list[Row]) -> list[list[int]]:
    reader = reader_of(pack_rows(rows))
    found = read_rows(reader, [(one.numbers.size, one.k) for one in rows], MUCH)
    reader.end()
    return [one.tolist() for one in found]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)), max_size=12), st.integers(0, 31)),
        max_size=5,
    )
)
def test_any_rows_come_back(rows: list[tuple[list[int], int]]) -> None:
    assert unpacked([row(numbers, k) for numbers, k in rows]) == [numbers for numbers, _ in rows]


def test_the_bits_of_a_row_are_counted_exactly() -> None:
    rng = np.random.default_rng(0)
    for k in (0, 3, 9):
        numbers = rng.geometric(0.01, 4000) - 1
        numbers[::500] = 1 << 20
        coded = pack_rows([row(numbers, k)])
        escaped = int((numbers >> k >= LIMIT).sum())
        planes = len(pack_planes((numbers[numbers >> k >= LIMIT] >> k).astype(np.uint32) - np.uint32(LIMIT)))
        packed = 8 * (len(coded) - planes - len(varint(len(coded))))
        assert 0 <= packed - (bits_of(np.asarray(numbers, np.uint32), k) - 32 * escaped) < 16


@pytest.mark.parametrize("share", [0.3, 0.1, 0.02, 0.003, 0.0004])
def test_even_gaps_cost_within_a_few_per_cent_of_the_entropy_and_no_other_parameter_is_better(share: float) -> None:
    count = 400_000
    marked = np.flatnonzero(np.random.default_rng(1).random(count) < share)
    gaps = gaps_between(marked)
    k = parameter_of_gaps(marked.size, count)
    entropy = -count * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert bits_of(gaps, k) < 1.04 * entropy
    assert bits_of(gaps, k) <= 1.005 * min(bits_of(gaps, other) for other in (max(k - 1, 0), k + 1))


def test_the_best_parameter_is_the_best() -> None:
    rng = np.random.default_rng(2)
    for scale in (0.5, 5, 100, 3e4):
        numbers = np.minimum(rng.exponential(scale, 3000), 2**31).astype(np.uint32)
        k = best_parameter(numbers)
        assert bits_of(numbers, k) == min(bits_of(numbers, other) for other in range(20))
    assert best_parameter(np.zeros(0, np.uint32)) == best_parameter(np.zeros(9, np.uint32)) == 0


@settings(max_examples=100, deadline=None)
@given(positions=st.sets(st.integers(0, 4000)))
def test_positions_come_back_from_their_gaps(positions: set[int]) -> None:
    marked = np.array(sorted(positions), np.int64)
    assert positions_between(gaps_between(marked), 4001).tolist() == marked.tolist()
    if positions:
        with pytest.raises(CorruptObjectError, match="outside"):
            positions_between(gaps_between(marked), max(positions))


def coded(unary: bytes, rest: bytes = b"") -> bytes:
    return varint(len(unary)) + unary + rest


@pytest.mark.parametrize(
    ("payload", "shapes"),
    [
        (b"", [(1, 0)]),
        (coded(b""), [(1, 0)]),
        (coded(b"\x80"), []),
        (coded(b"\0"), []),
        (coded(b"\xc0"), [(1, 0)]),
        (coded(b"\x80"), [(2, 0)]),
        (coded(b"\x80\0"), [(1, 0)]),
        (coded(b"\0\0\x04"), [(1, 0)]),
        (coded(b"\x80", b"\x40"), [(1, 1)]),
        (coded(b"\x80"), [(1, 1)]),
        (coded(b"\0\0\x08"), [(1, 0)]),
        (coded(b"\0\0\x08", pack_planes(np.array([2**32 - 1], np.uint32))), [(1, 0)]),
        (coded(b"\0\0\x08", b"\0" + pack_planes(np.array([2**31], np.uint32))), [(1, 4)]),
        (varint(1 << 34) + b"\x80", [(1, 0)]),
        (b"\x80\x80\x80\x80\x80\x01", [(1, 0)]),
        (b"\x81\0\x80", [(1, 0)]),
    ],
    ids=[
        "nothing",
        "no bits",
        "a number too many",
        "an empty byte",
        "two ones for one",
        "one for two",
        "a byte behind the last",
        "a quotient of 21",
        "padding that is not zero",
        "no low bits",
        "no rest",
        "a rest that wraps",
        "a number beyond 32 bits",
        "a length beyond the payload",
        "a varint of six bytes",
        "a varint longer than it needs",
    ],
)
def test_rows_that_no_encoder_writes_are_refused(payload: bytes, shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(CorruptObjectError):
        read_rows(reader_of(payload), shapes, 1 << 20)


@pytest.mark.parametrize("shapes", [[(1 << 40, 0)], [(1 << 40, 31)], [(1 << 22, 31)], [(9000, 0)]])
def test_rows_that_claim_more_than_there_is_are_refused_before_memory_is_spent(shapes: list[tuple[int, int]]) -> None:
    payload = coded(b"\x80" * 1000)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptObjectError):
            read_rows(reader_of(payload), shapes, 1 << 22)
        with pytest.raises(CorruptObjectError, match="more bits"):
            read_rows(reader_of(coded(b"\xff" * 200_000)), [(1_600_000, 0)], 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()

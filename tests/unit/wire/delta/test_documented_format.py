"""A second decoder, written from docs/weights.md alone, element by element: it must agree with ours."""

import json
import struct

import numpy as np
import pytest
import zstandard
from blake3 import blake3

from services.wire.delta import BitTensor, encode_delta, encode_keyframe
from services.wire.delta import layout as layout_module
from tests.unit.wire.delta.samples import model, nudged, tensor

WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "F8_E4M3": 1}
EXPONENT = {"BF16": (7, 255), "F16": (10, 31), "F32": (23, 255)}
Values = dict[str, list[int]]


class Payload:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def bits(self, count: int) -> list[int]:
        """`count` bits, highest of each byte first; those that fill the last byte are 0."""
        text = "".join(f"{byte:08b}" for byte in self.take((count + 7) // 8))
        assert "1" not in text[count:]
        return [int(bit) for bit in text[:count]]

    def rows(self, shapes: list[tuple[int, int]]) -> list[list[int]]:
        """One list of numbers for each (length, k)."""
        unary = self.bits(8 * self.varint())
        assert not unary or 1 in unary[-8:]
        bits = iter(unary)
        quotients = [[next(i for i in range(21) if next(bits)) for _ in range(length)] for length, _ in shapes]
        assert 1 not in bits
        low = iter(self.bits(sum(length * k for length, k in shapes)))
        rows = [[0] * length for length, _ in shapes]
        for row, (length, k) in zip(rows, shapes, strict=True):
            for plane in range(k):
                for place in range(length):
                    row[place] |= next(low) << plane
        long = sum(row.count(20) for row in quotients)
        rest = iter(self.planes(long, 4) if long else [])
        for row, quotient, (_, k) in zip(rows, quotients, shapes, strict=True):
            for place, q in enumerate(quotient):
                row[place] += (q + next(rest) if q == 20 else q) << k
        return rows

    def stream(self) -> bytes:
        word = self.u32()
        content = self.take(word >> 1)
        return zstandard.ZstdDecompressor().decompress(content) if word & 1 else content

    def planes(self, count: int, width: int) -> list[int]:
        rows = [self.stream() for _ in range(width)]
        assert all(len(row) == count for row in rows)
        return [sum(row[i] << 8 * plane for plane, row in enumerate(rows)) for i in range(count)]

    def positions(self) -> list[int]:
        found: list[int] = []
        here = 0
        for byte in self.stream():
            here += byte
            if byte != 255:
                found.append(here)
                here += 1
        return found


def differences(payload: Payload, encoding: int, count: int, width: int) -> list[int]:
    """new - base of each element of a SPLIT or SX group."""
    if encoding == 2:
        return [(folded >> 1) ^ -(folded & 1) for folded in payload.planes(count, width)]
    assert encoding == 3
    changed = payload.u32()
    positions = payload.positions()
    signs = payload.stream()
    assert (len(positions), len(signs)) == (changed, (changed + 7) // 8)
    sizes = [1] * changed
    big = payload.positions()
    for place, size in zip(big, payload.planes(len(big), width), strict=True):
        sizes[place] = size + 2
    result = [0] * count
    for number, position in enumerate(positions):
        negative = signs[number // 8] >> (7 - number % 8) & 1
        result[position] = -sizes[number] if negative else sizes[number]
    return result


def members(gaps: list[int], wanted: int, count: int) -> list[int]:
    """The positions of `wanted` of `count` elements, from the gaps between them or between the others."""
    found: list[int] = []
    here = 0
    for gap in gaps:
        found.append(here + gap)
        here += gap + 1
    assert here <= count
    return found if len(found) == wanted else sorted(set(range(count)) - set(found))


def conditioned(payload: Payload, base: list[int], dtype: str) -> list[int]:
    """new - base of each element of an XC chunk."""
    shift, mask = EXPONENT[dtype]
    limits = list(payload.take(payload.take(1)[0]))
    groups = [
        [i for i, bits in enumerate(base) if low <= (bits >> shift & mask) < high]
        for low, high in zip([0, *limits], [*limits, 1 << 20], strict=True)
    ]
    heads: list[tuple[int, int, int, int, int] | None] = []
    for _ in groups:
        changed = payload.varint() - 1
        k, big = (payload.take(1)[0], payload.varint()) if changed > 0 else (0, 0)
        k_big, k_size = payload.take(2) if big else (0, 0)
        heads.append((changed, k, big, k_big, k_size) if changed >= 0 else None)
    coded = [(len(group), *head) for group, head in zip(groups, heads, strict=True) if head]
    shapes = [(min(c, n - c), k) for n, c, k, *_ in coded]
    shapes += [(min(big, c - big), k) for _, c, _, big, k, _ in coded]
    shapes += [(big, k) for _, _, _, big, _, k in coded]
    rows = iter(payload.rows(shapes))
    places = [members(next(rows), c, n) for n, c, *_ in coded]
    far = [members(next(rows), big, c) for _, c, _, big, _, _ in coded]
    sizes = [dict(zip(where, next(rows), strict=True)) for where in far]
    signs = iter(payload.bits(sum(c for _, c, *_ in coded)))
    done = iter(zip(places, sizes, strict=True))
    change = [0] * len(base)
    for group, head in zip(groups, heads, strict=True):
        if head is None:
            steps = differences(payload, 2, len(group), WIDTH[dtype])
            for element, step in zip(group, steps, strict=True):
                change[element] = step
        else:
            where, size = next(done)
            for number, place in enumerate(where):
                step = size[number] + 2 if number in size else 1
                change[group[place]] = -step if next(signs) else step
    return change


def chunk_values(data: bytes | None, base: list[int] | None, count: int, dtype: str) -> list[int]:
    width = WIDTH[dtype]
    if data is None:
        assert base is not None
        return base
    payload = Payload(data)
    encoding = payload.take(1)[0]
    if encoding == 1:
        values = payload.planes(count, width)
    elif encoding == 4:
        assert base is not None
        change = conditioned(payload, base, dtype)
        values = [old + step for old, step in zip(base, change, strict=True)]
    else:
        assert base is not None
        steps = differences(payload, encoding, count, width)
        values = [old + step for old, step in zip(base, steps, strict=True)]
    assert payload.at == len(data)
    return [value % (1 << 8 * width) for value in values]


def decode(parts: tuple[bytes, ...], base: Values | None) -> Values:
    result: Values = {}
    rows: dict[str, str] = {}
    for part in parts:
        (length,) = struct.unpack("<Q", part[:8])
        header = json.loads(part[8 : 8 + length])
        metadata = header.pop("__metadata__")
        blank = part.replace(b'"check":"' + metadata["check"].encode(), b'"check":"' + b"0" * 64)
        assert blake3(blank).hexdigest() == metadata["check"]
        blocks = {name: part[8 + length :][slice(*entry["data_offsets"])] for name, entry in header.items()}
        table = json.loads(zstandard.ZstdDecompressor().decompress(blocks["__table__"]))
        for number, (name, dtype, shape) in enumerate(table["tensors"]):
            result.setdefault(name, [0] * int(np.prod(shape)))
            digest = blocks["__digests__"][32 * number : 32 * number + 32].hex()
            rows[name] = f"{name}\t{dtype}\t{','.join(map(str, shape))}\t{digest}\n"
        for chunk in table["chunks"]:
            cuts = [(table["tensors"][number][0], start, count) for number, start, count in chunk]
            before = None if base is None else [bits for name, s, n in cuts for bits in base[name][s : s + n]]
            dtype = table["tensors"][chunk[0][0]][1]
            data = blocks.get(f"{cuts[0][0]}@{cuts[0][1]}")
            values = iter(chunk_values(data, before, sum(n for _, _, n in cuts), dtype))
            for name, start, count in cuts:
                result[name][start : start + count] = [next(values) for _ in range(count)]
    root = blake3("".join(rows[name] for name in sorted(rows)).encode()).hexdigest()
    assert root == metadata["target_root"]
    return result


def values_of(weights: dict[str, BitTensor]) -> Values:
    return {name: old.bits.tolist() for name, old in weights.items()}


@pytest.mark.parametrize("codec", ["sx", "xc"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.8])
@pytest.mark.parametrize("chunk_elements", [1 << 22, 900])
def test_the_documented_format_is_the_format(
    codec: str, density: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_module, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(layout_module, "PART_BYTES", 8192 if chunk_elements == 900 else 1 << 26)
    rng = np.random.default_rng(0)
    base = model(rng)
    new = nudged(rng, base, density)
    update = encode_delta(base, new, run_id="run", base_version=0, target_version=1, codec=codec)
    assert decode(update.parts, values_of(base)) == values_of(new)
    assert decode(encode_keyframe(new, run_id="run", version=1).parts, None) == values_of(new)


@pytest.mark.parametrize("far", [[1], [1] * 30 + [2, 5, 30, 40, 20_000]], ids=["near", "far"])
def test_an_xc_delta_that_really_sorts_by_exponent_follows_the_document(far: list[int]) -> None:
    """Small weights change often and large ones seldom, so that the encoder makes several groups."""
    rng = np.random.default_rng(1)
    exponents = rng.integers(100, 125, 60_000)
    bits = exponents << 7 | rng.integers(0, 128, exponents.size)
    step = (rng.random(exponents.size) < 2.0 ** (103 - exponents)) * rng.choice([-1, 1], exponents.size)
    step *= rng.choice(far, exponents.size)
    base, new = {"w": tensor("BF16", bits)}, {"w": tensor("BF16", bits + step)}
    sizes: dict[str, int] = {}
    for codec in ("sx", "xc"):
        update = encode_delta(base, new, run_id="run", base_version=0, target_version=1, codec=codec)
        sizes[codec] = update.info.bytes
        assert decode(update.parts, values_of(base)) == values_of(new)
    assert sizes["xc"] < 0.8 * sizes["sx"]

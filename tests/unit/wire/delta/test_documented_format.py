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
        shift, mask = EXPONENT[dtype]
        limits = list(payload.take(payload.take(1)[0]))
        change = [0] * count
        for low, high in zip([0, *limits], [*limits, 1 << 20], strict=True):
            members = [i for i, bits in enumerate(base) if low <= (bits >> shift & mask) < high]
            steps = differences(payload, payload.take(1)[0], len(members), width)
            for member, step in zip(members, steps, strict=True):
                change[member] = step
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


def test_an_xc_delta_that_really_sorts_by_exponent_follows_the_document() -> None:
    """Small weights change often and large ones seldom, so that the encoder makes several groups."""
    rng = np.random.default_rng(1)
    exponents = rng.integers(100, 125, 60_000)
    bits = exponents << 7 | rng.integers(0, 128, exponents.size)
    step = (rng.random(exponents.size) < 2.0 ** (103 - exponents)) * rng.choice([-1, 1], exponents.size)
    base, new = {"w": tensor("BF16", bits)}, {"w": tensor("BF16", bits + step)}
    sizes: dict[str, int] = {}
    for codec in ("sx", "xc"):
        update = encode_delta(base, new, run_id="run", base_version=0, target_version=1, codec=codec)
        sizes[codec] = update.info.bytes
        assert decode(update.parts, values_of(base)) == values_of(new)
    assert sizes["xc"] < 0.8 * sizes["sx"]

"""Small weights with every awkward bit pattern, and damaged parts that still carry a valid check digest."""

import json
import struct
from collections.abc import Callable

import numpy as np
from blake3 import blake3

from services.wire.delta import BitTensor
from services.wire.delta.tensors import BITS_TYPE, ITEM_BYTES

BLANK = "0" * 64


def tensor(dtype: str, values: object, shape: tuple[int, ...] | None = None) -> BitTensor:
    bits = np.ascontiguousarray(values, BITS_TYPE[ITEM_BYTES[dtype]]).reshape(-1)
    return BitTensor(dtype=dtype, shape=(bits.size,) if shape is None else shape, bits=bits)


def random_tensor(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> BitTensor:
    size = ITEM_BYTES[dtype]
    count = int(np.prod(shape))
    return tensor(dtype, rng.integers(0, 256, count * size, dtype=np.uint8).view(BITS_TYPE[size]), shape)


def normal_bf16(rng: np.random.Generator, count: int) -> np.ndarray:
    """Weights as models have them: normal, standard deviation 0.02."""
    return ((rng.standard_normal(count, np.float32) * np.float32(0.02)).view(np.uint32) >> 16).astype(np.uint16)


def model(rng: np.random.Generator) -> dict[str, BitTensor]:
    """A small policy of several types, with a scalar and a tensor without elements."""
    return {
        "model.embed_tokens.weight": tensor("BF16", normal_bf16(rng, 6000), (100, 60)),
        "model.layers.0.mlp.up_proj.weight": tensor("BF16", normal_bf16(rng, 4000), (40, 100)),
        "model.norm.weight": tensor("F32", rng.standard_normal(60, np.float32).view(np.uint32)),
        "model.scale": random_tensor(rng, "F8_E4M3", (300,)),
        "model.steps": tensor("I64", [7], ()),
        "model.unused": tensor("F16", [], (0, 4)),
    }


def nudged(rng: np.random.Generator, weights: dict[str, BitTensor], density: float) -> dict[str, BitTensor]:
    """Each element moves one bit pattern up or down with probability `density`; one in ten of those moves further."""
    result: dict[str, BitTensor] = {}
    for name, old in weights.items():
        bits = old.bits.copy()
        hit = rng.random(bits.size) < density
        step = rng.choice([-1, 1], bits.size) * np.where(rng.random(bits.size) < 0.1, 300, 1)
        bits[hit] += step[hit].astype(np.int64).astype(bits.dtype)
        result[name] = BitTensor(dtype=old.dtype, shape=old.shape, bits=bits)
    return result


def same(left: dict[str, BitTensor], right: dict[str, BitTensor]) -> bool:
    return left.keys() == right.keys() and all(left[name].same_bits(right[name]) for name in left)


def split_part(part: bytes) -> tuple[dict[str, object], dict[str, bytes]]:
    """The header's JSON and the bytes of each entry, in file order."""
    length = struct.unpack("<Q", part[:8])[0]
    header = json.loads(part[8 : 8 + length])
    data = part[8 + length :]
    entries = {k: data[v["data_offsets"][0] : v["data_offsets"][1]] for k, v in header.items() if k != "__metadata__"}
    return header, entries


def join_part(metadata: dict[str, str], entries: dict[str, bytes]) -> bytes:
    """A part with these contents and a valid check digest."""
    header: dict[str, object] = {"__metadata__": {**metadata, "check": BLANK}}
    offset = 0
    for name, block in entries.items():
        header[name] = {"dtype": "U8", "shape": [len(block)], "data_offsets": [offset, offset + len(block)]}
        offset += len(block)
    text = json.dumps(header, separators=(",", ":")).encode()
    return seal(struct.pack("<Q", len(text)) + text + b"".join(entries.values()))


def seal(part: bytes) -> bytes:
    """Puts a valid check digest where the metadata has one, whatever else is wrong."""
    at = part.find(b'"check":"')
    if at < 0:
        return part
    blank = part[: at + 9] + BLANK.encode() + part[at + 73 :]
    return blank[: at + 9] + blake3(blank).hexdigest().encode() + blank[at + 73 :]


def edited(
    part: bytes,
    metadata: Callable[[dict[str, str]], None] = lambda fields: None,
    entries: Callable[[dict[str, bytes]], None] = lambda blocks: None,
) -> bytes:
    """The part with its metadata or entries changed in place by the functions, and sealed again."""
    header, blocks = split_part(part)
    fields = dict(header["__metadata__"])
    metadata(fields)
    entries(blocks)
    return join_part(fields, blocks)

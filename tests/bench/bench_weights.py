"""Sizes and speeds of the weight codecs on real AdamW traces, beside what peers send and what entropy allows.

    python -m tests.bench.bench_weights --out tests/bench/results/weights.json [--traces DIR] [--repeats N]

Speeds are GB of model bytes per second on one thread: `wall` by the clock, `cpu` by the CPU time that the process used,
which other work on the machine disturbs less. Ratios are bf16 bytes of the model over bytes of the update.
"""

import argparse
import atexit
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import zstandard

from services.wire.delta import (
    BitTensor,
    apply_update,
    compiled,
    digests_of,
    encode_delta,
    encode_keyframe,
    fold,
    read_weights,
    root_of,
)
from services.wire.delta.early import EarlyDecoder, copy_of
from tests.bench.machine import machine
from tests.bench.weight_traces import (
    BETAS,
    GAPS,
    LEARNING_RATES,
    ROWS,
    TOKENS,
    WARM_UP_STEPS,
    WEIGHTS_STD,
    make_traces,
    snapshot_path,
)

Policy = Mapping[str, BitTensor]
BF16_EXPONENT_SHIFT = 7


def index_and_value(base: Policy, new: Policy) -> int:
    """int32 index + bf16 value per change, as TRL sends them."""
    return 6 * sum(int(np.count_nonzero(base[name].bits != new[name].bits)) for name in base)


def gaps_and_values(base: Policy, new: Policy) -> int:
    """Gaps (u8, or u16 where a tensor needs it, with escapes) and values, each through zstd-1, as grail sends them."""
    compressor = zstandard.ZstdCompressor(level=1)
    total = 0
    for name in base:
        positions = np.flatnonzero(base[name].bits != new[name].bits)
        gaps = np.diff(positions, prepend=-1) - 1
        limit, dtype = (255, np.uint8) if gaps.size and gaps.max() < 255 else (65535, np.uint16)
        escapes = int((gaps // limit).sum())
        coded = (gaps % limit).astype(dtype)
        total += len(compressor.compress(coded.tobytes())) + escapes * coded.itemsize
        total += len(compressor.compress(new[name].bits[positions].tobytes()))
    return total


def xor_zstd(base: Policy, new: Policy) -> int:
    """XOR of the bits through zstd-1, as slime sends it."""
    compressor = zstandard.ZstdCompressor(level=1)
    return sum(len(compressor.compress((base[name].bits ^ new[name].bits).tobytes())) for name in base)


def entropies(base: Policy, new: Policy) -> dict[str, float]:
    """Bytes that an ideal coder of independent elements needs: positions and differences.

    `iid` knows only how often each difference occurs; `exponent` knows it for each exponent of the base weight.
    """
    present = np.zeros(256)
    unchanged = np.zeros(256)
    keys: list[np.ndarray] = []
    for name in base:
        old, now = base[name].bits, new[name].bits
        exponents = (old >> BF16_EXPONENT_SHIFT) & 0xFF
        changed = np.flatnonzero(old != now)
        count = np.bincount(exponents, minlength=256)
        present += count
        unchanged += count - np.bincount(exponents[changed], minlength=256)
        keys.append(exponents[changed].astype(np.int64) << 16 | (now[changed] - old[changed]))
    key, counts = np.unique(np.concatenate(keys), return_counts=True)
    _, inverse = np.unique(key & 0xFFFF, return_inverse=True)
    by_difference = np.bincount(inverse, weights=counts)
    total = present.sum()
    iid = -(_weighted_log(by_difference, total) + _weighted_log(unchanged.sum(keepdims=True), total))
    conditional = -_weighted_log(unchanged, present) - _weighted_log(counts.astype(float), present[key >> 16])
    return {"iid": iid / 8, "exponent": conditional / 8}


def _weighted_log(counts: np.ndarray, totals: np.ndarray | float) -> float:
    some = counts > 0
    shares = counts[some] / (totals[some] if isinstance(totals, np.ndarray) else totals)
    return float((counts[some] * np.log2(shares)).sum())


def delta(base: Policy, new: Policy, codec: str, gap: int = 1, start: int = 0, base_root: str = "0" * 64):
    return encode_delta(
        base, new, run_id="bench", base_version=start, target_version=start + gap, codec=codec, base_root=base_root
    )


def measure_sizes(traces: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for lr in LEARNING_RATES:
        base = read_weights(snapshot_path(traces, lr, 0))
        for gap in GAPS:
            new = read_weights(snapshot_path(traces, lr, gap))
            full = sum(tensor.nbytes for tensor in base.values())
            sx, xc = delta(base, new, "sx", gap), delta(base, new, "xc", gap)
            changed, parameters = sx.info.changed, sx.info.parameters
            entropy = entropies(base, new)
            sizes = {
                "sx": sx.info.bytes,
                "xc": xc.info.bytes,
                "index_value": index_and_value(base, new),
                "gaps_values": gaps_and_values(base, new),
                "xor_zstd1": xor_zstd(base, new),
                "entropy_iid": entropy["iid"],
                "entropy_exponent": entropy["exponent"],
            }
            row: dict[str, float] = {"lr": lr, "gap": gap, "changed": changed, "density": changed / parameters}
            row |= {f"bytes_{name}": size for name, size in sizes.items()}
            row |= {f"ratio_{name}": full / size for name, size in sizes.items()}
            row["sx_over_entropy_iid"] = sx.info.bytes / entropy["iid"]
            row["entropy_exponent_over_xc"] = entropy["exponent"] / xc.info.bytes
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def measure_squash(traces: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for lr in LEARNING_RATES:
        first = old = read_weights(snapshot_path(traces, lr, 0))
        root = root_of(old)
        singles: list[tuple[bytes, ...]] = []
        for step in range(16):
            new = read_weights(snapshot_path(traces, lr, step + 1))
            update = delta(old, new, "sx", 1, step, root)
            singles.append(update.parts)
            old, root = new, update.info.target_root
        start = time.process_time()
        squashed = fold(singles)
        seconds = time.process_time() - start
        assert root_of(apply_update(squashed.parts, first)) == root
        total = sum(len(part) for parts in singles for part in parts)
        rows.append(
            {
                "lr": lr,
                "bytes_16_singles": total,
                "bytes_squashed": squashed.info.bytes,
                "share": squashed.info.bytes / total,
                "fold_cpu_s": seconds,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def speed(work: Callable[[], object], model_bytes: int, repeats: int) -> dict[str, float]:
    """Median GB/s over `repeats` runs, after one that is not counted."""
    work()
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return {
        "wall": model_bytes / statistics.median(wall) / 1e9,
        "cpu": model_bytes / statistics.median(cpu) / 1e9,
        "best_wall": model_bytes / min(wall) / 1e9,
    }


def measure_speeds(traces: Path, repeats: int) -> dict[str, dict[str, float]]:
    base = read_weights(snapshot_path(traces, 1e-6, 0))
    new = read_weights(snapshot_path(traces, 1e-6, 1))
    size = sum(tensor.nbytes for tensor in base.values())
    root = root_of(base)
    sx, xc = delta(base, new, "sx", base_root=root).parts, delta(base, new, "xc", base_root=root).parts
    keyframe = encode_keyframe(base, run_id="bench", version=0)
    assert compiled.prepare(), "these are the speeds of a learner, which has numba"
    full = b"".join(tensor.bits.tobytes() for tensor in base.values())
    staging = apply_update(sx, base)
    works: dict[str, Callable[[], object]] = {
        "hash": lambda: digests_of(new),
        "sx_encode": lambda: delta(base, new, "sx", base_root=root),
        "sx_decode_verify": lambda: apply_update(sx, base),
        "sx_decode_verify_staged": lambda: apply_update(sx, base, staging=staging),
        "sx_decode_verify_ahead": ahead_decoder(base, new),
        "xc_encode": lambda: delta(base, new, "xc", base_root=root),
        "xc_decode_verify": lambda: apply_update(xc, base),
        "xc_decode_verify_staged": lambda: apply_update(xc, base, staging=staging),
        "keyframe_encode": lambda: encode_keyframe(base, run_id="bench", version=0),
        "keyframe_decode_verify": lambda: apply_update(keyframe.parts, None),
        "zstd3_full_encode": lambda: zstandard.ZstdCompressor(level=3).compress(full),
        "copy": lambda: [tensor.bits.copy() for tensor in base.values()],
    }
    speeds = {name: speed(work, size, repeats) for name, work in works.items()}
    speeds["keyframe_ratio"] = {"ratio": keyframe.info.ratio}
    speeds["zstd3_full_ratio"] = {"ratio": len(full) / len(zstandard.ZstdCompressor(level=3).compress(full))}
    print(json.dumps(speeds, indent=1), file=sys.stderr, flush=True)
    return speeds


def ahead_decoder(base: Policy, new: Policy) -> Callable[[], None]:
    """As a sampler decodes: into a copy of what it holds. There and back in turn, so that it is one each time."""
    policies = (base, new)
    roots = (root_of(base), root_of(new))
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    files: list[list[Path]] = []
    for way in (0, 1):
        parts = delta(policies[way], policies[1 - way], "sx", base_root=roots[way]).parts
        files.append([folder / f"{way}-{number}.safetensors" for number in range(len(parts))])
        for path, part in zip(files[way], parts, strict=True):
            path.write_bytes(part)
    staging = copy_of(base, 1)
    ways = itertools.cycle((0, 1))

    def decode() -> None:
        way = next(ways)
        early = EarlyDecoder(policies[way], staging, base_root=roots[way], workers=1, level=True)
        for path in files[way]:
            early.add(path)
        assert early.finish(roots[1 - way]) is not None
        early.close()

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--traces", type=Path, help="folder of snapshots, made if it is not there (9 GB)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        traces = args.traces or Path(scratch)
        before = {**machine(), "numpy": np.__version__, "zstandard": zstandard.__version__}
        make_traces(traces)
        parameters = sum(tensor.bits.size for tensor in read_weights(snapshot_path(traces, 1e-6, 0)).values())
        result = {
            "machine": before,
            "model": {"parameters": parameters, "shape": "Qwen3, 16 layers, hidden 640, vocabulary 8192, tied"},
            "trace": {
                "optimizer": f"AdamW {BETAS}, fp32",
                "initial_std": WEIGHTS_STD,
                "warm_up_steps": WARM_UP_STEPS,
                "rows": ROWS,
                "tokens": TOKENS,
            },
            "speeds_gb_per_s": measure_speeds(traces, args.repeats),
            "sizes": measure_sizes(traces),
            "squash_16": measure_squash(traces),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

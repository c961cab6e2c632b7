"""How weight objects travel: link use against raw TCP, memory with stalled readers, and the thousand random steps.

    nice -n 5 python -m tests.bench.bench_transfer [--mbytes 32] [--turns 3] [--steps 1000]

Link use: the same number of bytes through the same emulated link (services.lab.wan, a proxy in Python, a process of
its own), raw TCP and FetchObject in turn, connections open; the ratio is what counts. The proxy paces bytes but has no
slow start and no congestion control, and on a busy machine it is itself slow: `raw_share_of_link` says how far raw TCP
got. Memory: resident bytes of a learner's weight service, in a process of its own, before and while readers that asked
for an object and stopped reading hang on to it. JSON goes to tests/bench/results/transfer.json.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import grpc

from heterorl.v1 import weights_pb2
from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.runtime.address import Address
from services.sampler.object_cache import ObjectCache
from services.sampler.weight_sources import WeightSources
from services.wire.channel import channel_options
from services.wire.identity import Identity, Role
from services.wire.types import ObjectRef
from tests.support.random_steps import random_steps
from tests.support.weight_site import chunks_of, dial, learner_site
from tests.unit.learner.weights_of_tests import make_weights

RESULTS = Path(__file__).parent / "results" / "transfer.json"
PROFILES = ((100.0, 100.0, 0.0), (100.0, 100.0, 0.001), (1000.0, 100.0, 0.0))
"""(Mbit/s, round trip in ms, chance that a packet is lost) of the emulated links."""
STALLED = 20
STALL_S = 8.0
RECEIVE_BYTES = 1 << 20


async def serve(folder: Path, sizes: Sequence[int], stall_s: float) -> None:
    """A weight service with objects of random bytes, and a raw TCP sender of as many; ends with its standard input."""
    async with learner_site(folder, stall_s=stall_s) as site:
        await site.publisher.publish(0, make_weights(1))
        refs = [site.store.put(os.urandom(size)) for size in sizes]
        assert all(site.store.is_sound(ref) for ref in refs)  # as GetPlan checks what it names
        raw = await asyncio.start_server(send_raw, "127.0.0.1", 0)
        facts = {
            "port": site.address.port,
            "raw_port": raw.sockets[0].getsockname()[1],
            "objects": [asdict(ref) for ref in refs],
        }
        print(json.dumps(facts), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        raw.close()


async def send_raw(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Each line asks for so many bytes."""
    block = os.urandom(1 << 20)
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            left = int(line)
            while left:
                writer.write(block[: min(left, len(block))])
                left -= min(left, len(block))
                await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def child(*words: str) -> AsyncGenerator[tuple[int, dict[str, object]]]:
    """A Python process that prints one JSON line and ends with its standard input: (pid, the line)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.pid, json.loads(await process.stdout.readline())
    finally:
        process.stdin.close()
        if process.returncode is None and "services.lab.wan" in words:
            process.terminate()
        await process.wait()


def link(upstream: int, mbit: float, rtt_ms: float, loss: float) -> tuple[str, ...]:
    return (
        *("-m", "services.lab.wan", "--listen", "127.0.0.1:0", "--upstream", f"127.0.0.1:{upstream}"),
        *("--rate-mbit", str(mbit), "--rtt-ms", str(rtt_ms), "--loss", str(loss)),
    )


async def raw_s(port: int, size: int, host: str = "127.0.0.1", warm: int = 4 << 20) -> float:
    """Seconds from asking to the last byte, over a connection that has carried `warm` bytes before."""
    reader, writer = await asyncio.open_connection(host, port, limit=RECEIVE_BYTES)
    try:
        await take_raw(reader, writer, warm)
        began = time.perf_counter()
        await take_raw(reader, writer, size)
        return time.perf_counter() - began
    finally:
        writer.close()


async def take_raw(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
    writer.write(f"{size}\n".encode())
    left = size
    while left:
        data = await reader.read(min(left, RECEIVE_BYTES))
        assert data, "the sender ended early"
        left -= len(data)


async def fetch_s(port: int, folder: Path, warm: ObjectRef, refs: Sequence[ObjectRef]) -> tuple[float, float]:
    """As samplers do it, to verified files on disk, one sampler per object at the same time: (seconds, warm-up s)."""
    async with contextlib.AsyncExitStack() as stack:
        caches: list[ObjectCache] = []
        for number in range(len(refs)):
            channel = await stack.enter_async_context(dial(Address(host="127.0.0.1", port=port), f"s{number}"))
            sources = WeightSources(WeightServiceStub(channel))
            caches.append(ObjectCache(folder / f"s{number}", sources, 1 << 30))
        began = time.perf_counter()
        await asyncio.gather(*(cache.fetch(warm, lambda _: None) for cache in caches))
        warm_s = time.perf_counter() - began
        began = time.perf_counter()
        pairs = zip(caches, refs, strict=True)
        await asyncio.gather(*(cache.fetch(ref, lambda _: None) for cache, ref in pairs))
        return time.perf_counter() - began, warm_s


async def link_use(mbit: float, rtt_ms: float, loss: float, size: int, turns: int) -> dict[str, object]:
    """Raw, one sampler, four samplers, in turn; medians."""
    rows: dict[str, list[float]] = {"raw": [], "one": [], "four": [], "cold_4_mbytes": []}
    with tempfile.TemporaryDirectory() as name:
        words = ("-m", "tests.bench.bench_transfer", "--serve", name, str(4 << 20), str(size), *[str(size // 4)] * 4)
        async with child(*words) as (_, facts):
            warm, whole, *quarters = [ObjectRef(**row) for row in facts["objects"]]  # type: ignore[attr-defined]
            ports = facts["port"], facts["raw_port"]
            async with (
                child(*link(ports[0], mbit, rtt_ms, loss)) as (_, weights),  # type: ignore[arg-type]
                child(*link(ports[1], mbit, rtt_ms, loss)) as (_, raw),  # type: ignore[arg-type]
            ):
                for turn in range(turns):
                    rows["raw"].append(await raw_s(int(str(raw["port"])), size))
                    for key, refs in (("one", [whole]), ("four", quarters)):
                        folder = Path(name) / f"{key}{turn}"
                        seconds, warm_s = await fetch_s(int(str(weights["port"])), folder, warm, refs)
                        rows[key].append(seconds)
                        if key == "one":
                            rows["cold_4_mbytes"].append(warm_s)
    best = {key: statistics.median(values) for key, values in rows.items()}
    return {
        "mbit_s": mbit,
        "rtt_ms": rtt_ms,
        "loss": loss,
        "bytes": size,
        "seconds": rows,
        "raw_share_of_link": size * 8 / 1e6 / best["raw"] / mbit,
        "one_sampler_of_raw": best["raw"] / best["one"],
        "four_samplers_of_raw": best["raw"] / best["four"],
    }


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no resident memory")


async def stalled_readers() -> dict[str, object]:
    """Readers with narrow transports that take one chunk each and stop. Resident memory over the time until the cut."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with tempfile.TemporaryDirectory() as name:
        words = ("-m", "tests.bench.bench_transfer", "--stall-s", str(STALL_S), "--serve", name)
        async with child(*words, str(48 << 20)) as (pid, facts), contextlib.AsyncExitStack() as stack:
            ref = ObjectRef(**facts["objects"][0])  # type: ignore[index]
            address = f"127.0.0.1:{facts['port']}"
            warm = await stack.enter_async_context(dial(Address(host="127.0.0.1", port=int(str(facts["port"])))))
            reader = WeightSources(WeightServiceStub(warm)).learner.readers[0]
            async with contextlib.aclosing(reader.read(ref.object_id, 0)) as chunks:
                async for _ in chunks:
                    pass
            before = resident_bytes(pid)
            calls = []
            for number in range(STALLED):
                identity = Identity(role=Role.SAMPLER, id=f"stalled-{number}")
                channel = grpc.aio.insecure_channel(address, options=[*channel_options("bulk", identity), *options])
                await stack.enter_async_context(channel)
                call = WeightServiceStub(channel).FetchObject(weights_pb2.FetchObjectRequest(object_id=ref.object_id))
                await call.read()
                calls.append(call)
            most, began = before, time.monotonic()
            while time.monotonic() - began < STALL_S + 4:
                await asyncio.sleep(0.2)
                most = max(most, resident_bytes(pid))
            after = resident_bytes(pid)
            ends = [await end_of(call) for call in calls]
    return {
        "readers": STALLED,
        "stall_s": STALL_S,
        "object_bytes": ref.size_bytes,
        "rss_before_mib": round(before / 2**20, 1),
        "rss_most_more_mib": round((most - before) / 2**20, 1),
        "rss_after_the_cut_more_mib": round((after - before) / 2**20, 1),
        "cut": ends.count("UNAVAILABLE"),
    }


async def end_of(call: grpc.aio.UnaryStreamCall) -> str:
    """The name of the status that a call ends with, once what was under way is read."""
    try:
        async with asyncio.timeout(30):
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def steps(count: int) -> dict[str, object]:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, chunks_of(500):
        outcome = await random_steps(Path(name), steps=count, seed=11)
    return {
        "steps": count,
        "seconds": time.perf_counter() - began,
        "equal_roots": set(outcome.roots.values()) == {outcome.root},
        **asdict(outcome),
    }


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    results: dict[str, object] = {
        "machine": {"cpus": os.cpu_count(), "load_1m": os.getloadavg()[0], "python": platform.python_version()},
        "grpcio": version("grpcio"),
        "link_use": [await link_use(*profile, arguments.mbytes << 20, arguments.turns) for profile in PROFILES],
        "stalled_readers": await stalled_readers(),
    }
    if arguments.steps:
        results["random_steps"] = await steps(arguments.steps)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbytes", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stall-s", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        folder, *sizes = arguments.serve
        asyncio.run(serve(Path(folder), [int(size) for size in sizes], arguments.stall_s))
        return
    results = asyncio.run(measure(arguments))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

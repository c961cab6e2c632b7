"""What runs at the two ends of the link of bench_wan: a learner's half, a sampler's half, and their clocks."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.runtime.address import Address
from services.runtime.errors import UnavailableError
from services.sampler.follower import Follower, HeldPolicy
from services.sampler.object_cache import ObjectCache
from services.sampler.plan_fetch import fetching
from services.sampler.tally import Tally
from services.sampler.weight_sources import WeightSources
from services.wire.credentials import channel_credentials, server_credentials
from services.wire.delta import BitTensor, Weights, read_weights, root_of
from services.wire.tls import TlsFiles
from services.wire.types import ObjectRef, Plan, PlanStep, SignedManifest, UpdateKind
from tests.bench.tun_link import ADDRESSES
from tests.support.scripted_learner import manifest_of
from tests.support.weight_site import RUN_ID, dial, learner_site
from tests.unit.learner.weights_of_tests import make_weights

HOST = ADDRESSES[0]
RECEIVE_BYTES = 1 << 20
RECYCLING_S = 1.0
"""Between two versions a sampler has time to copy what it holds."""
SAMPLERS = 4
THREADS = 2
"""That encode and decode: `publish.workers` and `decode_threads` as shipped."""


def trace(traces: Path, step: int) -> dict[str, BitTensor]:
    """A snapshot of the lowest learning rate."""
    from tests.bench.weight_traces import snapshot_path  # imports torch and transformers: not beside a measurement

    return read_weights(snapshot_path(traces, 1e-6, step))


async def serve(folder: Path, sizes: Sequence[int], traces: Path | None) -> None:
    """In the learner's namespace: WeightService, raw TCP, and publishing when told so; ends with standard input."""
    tls, _ = server_credentials(TlsFiles.in_directory(folder / "pki", "learner"))
    versions = [make_weights(1)] if traces is None else [trace(traces, n) for n in (0, 1)]
    events = Events()
    async with learner_site(folder / "learner", host=HOST, credentials=tls, workers=THREADS) as site:
        await site.publisher.publish(0, versions[0])
        refs = [site.store.put(os.urandom(size)) for size in sizes]
        assert all(site.store.is_sound(ref) for ref in refs)  # as GetPlan checks what it names
        raw = await asyncio.start_server(send_raw, HOST, 0)
        facts = {
            "port": site.address.port,
            "raw_port": raw.sockets[0].getsockname()[1],
            "objects": [asdict(ref) for ref in refs],
            "public_key": site.public_key.hex(),
            "pid": os.getpid(),
        }
        print(json.dumps(facts), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            number = int(line)
            memory = Peak()
            began = time.monotonic()
            await site.publisher.publish(number, versions[number % 2])
            row = {**events.newest["version_published"], "began": began, "done": time.monotonic(), "root": site.root}
            print(json.dumps(row | {"more_mib": memory.more_mib}), flush=True)
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


async def take_raw(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
    writer.write(f"{size}\n".encode())
    left = size
    while left:
        data = await reader.read(min(left, RECEIVE_BYTES))
        assert data, "the sender ended early"
        left -= len(data)


def sources_of(folder: Path, port: int, name: str, channels: int, stack: contextlib.AsyncExitStack) -> WeightSources:
    credentials, _ = channel_credentials(TlsFiles.in_directory(folder / "pki", name))
    stubs: list[WeightServiceStub] = []
    for _ in range(channels):
        channel = dial(Address(host=HOST, port=port), name, credentials)
        stack.push_async_callback(channel.close)
        stubs.append(WeightServiceStub(channel))
    return WeightSources(stubs[0], lanes=stubs[1:])


@dataclass(slots=True, kw_only=True)
class Meter:
    """Wall seconds of a block, and what each process (name -> pid) took of the processor in it."""

    pids: dict[str, int]
    row: dict[str, float] = field(default_factory=dict[str, float])

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        before = {name: cpu_s(pid) for name, pid in self.pids.items()}
        began = time.perf_counter()
        yield
        self.row = {"wall": round(time.perf_counter() - began, 3)}
        self.row |= {f"{name}_cpu": round(cpu_s(pid) - before[name], 2) for name, pid in self.pids.items()}


class Peak:
    """Of this process's resident memory, from now on (proc(5): 5 in clear_refs makes VmHWM begin anew)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_kib("VmRSS")

    @property
    def more_mib(self) -> float:
        return round((_status_kib("VmHWM") - self._before) / 1024, 1)


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def cpu_s(pid: int) -> float:
    """Processor time of a process and all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def take_over_tcp(meter: Meter, port: int, warm: ObjectRef, sizes: Sequence[int]) -> None:
    """Each of `sizes` by a connection of its own, at the same time."""
    ends = [await asyncio.open_connection(HOST, port, limit=RECEIVE_BYTES) for _ in sizes]
    await asyncio.gather(*(take_raw(reader, writer, warm.size_bytes) for reader, writer in ends))
    with meter.running():
        await asyncio.gather(*(take_raw(*end, size) for end, size in zip(ends, sizes, strict=True)))
    for _, writer in ends:
        writer.close()


async def fetch_plans(
    meter: Meter, folder: Path, port: int, warm: ObjectRef, plans: Sequence[Sequence[ObjectRef]], channels: int = 1
) -> None:
    """One sampler for each of `plans`, at the same time, to files on disk whose every chunk was checked, on warm
    connections. (The BLAKE3 of an update is checked when it is applied, at 4 GB/s.)"""
    async with contextlib.AsyncExitStack() as stack:
        name = tempfile.mkdtemp(dir=folder)
        caches = [
            ObjectCache(Path(name) / str(n), sources_of(folder, port, f"s{n}", channels, stack), 1 << 30)
            for n in range(len(plans))
        ]
        await asyncio.gather(*(fetch(cache, [warm], channels) for cache in caches))
        with meter.running():
            await asyncio.gather(*(fetch(cache, refs, channels) for cache, refs in zip(caches, plans, strict=True)))


async def fetch(cache: ObjectCache, refs: Sequence[ObjectRef], channels: int) -> None:
    """Goes on after a break, as a follower does; ends with the third."""
    step = PlanStep(kind=UpdateKind.KEYFRAME, base_root="", target_root="", target_version=0, objects=tuple(refs))
    manifest = SignedManifest(manifest=b"", signature=b"", decoded=manifest_of(0, ""))
    for left in (2, 1, 0):
        try:
            async with fetching(cache, Plan(target=manifest, steps=(step,)), Tally(), channels) as fetch:
                await fetch.files(step)
        except UnavailableError as error:
            if not left:
                raise
            print(error, file=sys.stderr, flush=True)
        else:
            return


async def link_use(folder: Path, facts: dict[str, object], turns: int) -> dict[str, list[dict[str, float]]]:
    """In the sampler's namespace: wall seconds of each way, in turn, and every process's processor seconds in them."""
    port, raw_port = int(str(facts["port"])), int(str(facts["raw_port"]))
    warm, whole, *quarters = [ObjectRef(**row) for row in facts["objects"]]  # type: ignore[attr-defined]
    meter = Meter(pids={"sender": int(str(facts["pid"])), "receiver": os.getpid(), "link": int(str(facts["link_pid"]))})
    ways: dict[str, Callable[[], Coroutine[object, object, None]]] = {
        "raw": lambda: take_over_tcp(meter, raw_port, warm, [whole.size_bytes]),
        "raw_four": lambda: take_over_tcp(meter, raw_port, warm, [whole.size_bytes] * SAMPLERS),
        "one": lambda: fetch_plans(meter, folder, port, warm, [quarters]),
        "four": lambda: fetch_plans(meter, folder, port, warm, [quarters] * SAMPLERS),
        "four_a_quarter_each": lambda: fetch_plans(meter, folder, port, warm, [[ref] for ref in quarters]),
        "one_with_four_channels": lambda: fetch_plans(meter, folder, port, warm, [quarters], 4),
        "one_object": lambda: fetch_plans(meter, folder, port, warm, [[whole]]),
    }
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, measure in ways.items():
            await measure()
            rows[way].append(meter.row)
    return rows


class Events(logging.Handler):
    """Keeps the facts of the newest event of each name that the services log."""

    def __init__(self) -> None:
        super().__init__()
        self.newest: dict[str, dict[str, object]] = {}
        logger = logging.getLogger("heterorl")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.newest[record.getMessage()] = getattr(record, "heterorl_facts", {})


class NoEngine:
    """Takes what it is given: what is measured ends with verified weights."""

    async def load(self, weights: Weights, version: int, root: str) -> float:
        del weights, version, root
        return 0.0


async def follow(folder: Path, facts: dict[str, object], traces: Path) -> None:
    """In the sampler's namespace: holds version 0, and says for each line on standard input when it was verified."""
    events = Events()
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        sources = sources_of(folder, int(str(facts["port"])), "s0", 1, stack)
        follower = Follower(
            sources=sources,
            cache=ObjectCache(folder / "sampler", sources, 1 << 30),
            tally=Tally(),
            run_id=RUN_ID,
            public_key=bytes.fromhex(str(facts["public_key"])),
            news=asyncio.Event(),
            decode_workers=THREADS,
        )
        weights = trace(traces, 0)
        held = follower._held = HeldPolicy(weights=weights, version=0, root=root_of(weights))
        await fetch(follower._cache, [ObjectRef(**facts["objects"][0])], 1)  # type: ignore[index]
        running = [tasks.create_task(follower.watch())]
        await follower._note_loaded(held)
        running.append(tasks.create_task(follower.follow(NoEngine())))  # type: ignore[arg-type]
        print(json.dumps({"version": 0}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            memory = Peak()
            await follower.reached(int(line))
            row = {**events.newest["version_fetched"], "reached": time.monotonic(), "root": follower.root}
            row["more_mib"] = memory.more_mib
            await asyncio.sleep(RECYCLING_S)
            print(json.dumps(row), flush=True)
        for task in running:
            task.cancel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--serve", nargs="+")
    parser.add_argument("--follow", nargs=2)
    parser.add_argument("--link-use", nargs=3)
    arguments = parser.parse_args()
    if arguments.serve:
        folder, *sizes = arguments.serve
        asyncio.run(serve(Path(folder), [int(size) for size in sizes], arguments.traces))
    elif arguments.follow:
        asyncio.run(follow(Path(arguments.follow[0]), json.loads(arguments.follow[1]), arguments.traces))
    else:
        folder, facts, turns = arguments.link_use
        print(json.dumps(asyncio.run(link_use(Path(folder), json.loads(facts), int(turns)))), flush=True)


if __name__ == "__main__":
    main()

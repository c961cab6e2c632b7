"""Weights over the kernel's own TCP on an emulated wide-area link: link use, and what a user would pick instead.

    python -m tests.bench.bench_wan --traces DIR --large DIR [--out tests/bench/results/wan.json]      (Linux, as root)

Two network namespaces joined by tests/bench/tun_link.py; all parts over mutual TLS as shipped, raw TCP without.
`link_use`: the same bytes by raw TCP; in four objects (a keyframe has one for each 64 MiB of the model) by one sampler,
by four with one each, by one with four channels; in one object by one; in turn, connections open and warm. Beside the
seconds stands what each process took of the processor in them.
`against`: the learner publishes the next version of a policy, and a sampler follows to verified weights, with the
seconds of each phase; beside it curl fetches the whole checkpoint from nginx (then SHA-256), and rsync updates the old
checkpoint. For 84M parameters (`--traces`, of tests/bench/weight_traces.py) and 596M (`--large`, of large_pair.py).
`apt-get install nginx-light curl rsync iproute2` first.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
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
from services.wire.delta import BitTensor, Weights, read_weights, root_of, write_weights
from services.wire.pki import make_dev_pki
from services.wire.tls import TlsFiles
from services.wire.types import Manifest, ObjectRef, Plan, PlanStep, SignedManifest, UpdateKind
from tests.bench.bench_transfer import RECEIVE_BYTES, send_raw, take_raw
from tests.bench.tun_link import ADDRESSES
from tests.support.weight_site import RUN_ID, dial, learner_site
from tests.unit.learner.weights_of_tests import make_weights

RESULTS = Path(__file__).parent / "results" / "wan.json"
HOST = ADDRESSES[0]
THREADS = 2
"""That encode and decode: `publish.workers` and `decode_threads` as shipped."""
WARM_AGAINST = 8 << 20
"""Bytes that the sampler's connection has carried before the delta."""
WARM_DELAYS = 5
"""A connection is warm when it has carried the bytes of so many round trips at the link's rate: both TCP's and gRPC's
windows have grown by then."""
NO_MANIFEST = Manifest(
    run_id=RUN_ID,
    learner_epoch=1,
    version=0,
    root="",
    parent_root="",
    full_bytes=0,
    parameters=0,
    changed=0,
    model_files_sha256="",
    published_unix_ms=0,
    update_bytes=0,
)
"""Of objects of random bytes."""
PROFILES = (
    {"rate-mbit": 100, "rtt-ms": 100, "loss": 0.0, "mtu": 1500, "congestion": "bbr", "mbytes": 32},
    {"rate-mbit": 1000, "rtt-ms": 100, "loss": 0.0, "mtu": 9000, "congestion": "bbr", "mbytes": 192},
    {"rate-mbit": 100, "rtt-ms": 100, "loss": 0.001, "mtu": 1500, "congestion": "bbr", "mbytes": 32},
    {"rate-mbit": 100, "rtt-ms": 100, "loss": 0.001, "mtu": 1500, "congestion": "reno", "mbytes": 8},
)
NGINX = """daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{}}
http {{ access_log off; sendfile on; server {{ listen {host}:8080; root {folder}/files; }} }}
"""
RSYNC = "use chroot = false\naddress = {host}\nport = 8730\n[files]\npath = {folder}/files\n"


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
        assert all(site.store.is_sound(ref.object_id) for ref in refs)  # as GetPlan checks what it names
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
            began = time.monotonic()
            await site.publisher.publish(number, versions[number % 2])
            row = {**events.newest["version_published"], "began": began, "done": time.monotonic(), "root": site.root}
            print(json.dumps(row), flush=True)
        raw.close()


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


def cpu_s(pid: int) -> float:
    """Processor time of a process and all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def take_over_tcp(meter: Meter, port: int, warm: ObjectRef, size: int) -> None:
    reader, writer = await asyncio.open_connection(HOST, port, limit=RECEIVE_BYTES)
    await take_raw(reader, writer, warm.size_bytes)
    with meter.running():
        await take_raw(reader, writer, size)
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
    manifest = SignedManifest(manifest=b"", signature=b"", decoded=NO_MANIFEST)
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
    port = int(str(facts["port"]))
    warm, whole, *quarters = [ObjectRef(**row) for row in facts["objects"]]  # type: ignore[attr-defined]
    meter = Meter(pids={"sender": int(str(facts["pid"])), "receiver": os.getpid(), "link": int(str(facts["link_pid"]))})
    ways: dict[str, Callable[[], Coroutine[object, object, None]]] = {
        "raw": lambda: take_over_tcp(meter, int(str(facts["raw_port"])), warm, whole.size_bytes),
        "one": lambda: fetch_plans(meter, folder, port, warm, [quarters]),
        "four": lambda: fetch_plans(meter, folder, port, warm, [[ref] for ref in quarters]),
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
            await follower.reached(int(line))
            row = {**events.newest["version_fetched"], "reached": time.monotonic(), "root": follower.root}
            print(json.dumps(row), flush=True)
        for task in running:
            task.cancel()


def write_checkpoint(weights: dict[str, BitTensor], folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_weights(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def seconds_of(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - began


@contextlib.contextmanager
def process(namespace: str, *words: str) -> Generator[subprocess.Popen[str]]:
    """A process in a namespace; ends with its standard input."""
    child = subprocess.Popen(
        ["ip", "netns", "exec", namespace, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        assert child.stdin is not None
        child.stdin.close()
        if words[0] != sys.executable:
            child.terminate()
        child.wait(30)


def said(child: subprocess.Popen[str]) -> dict[str, object]:
    assert child.stdout is not None
    return json.loads(child.stdout.readline())


def tell(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{line}\n")
    child.stdin.flush()


@contextlib.contextmanager
def link(profile: dict[str, object]) -> Generator[tuple[str, str, int]]:
    """Both namespaces, and the pid of the process between them."""
    words = [word for key, value in profile.items() if key != "mbytes" for word in (f"--{key}", str(value))]
    name = f"hb{os.getpid()}"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.tun_link", "--name", name, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said(child)
        yield f"{name}-a", f"{name}-b", child.pid
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(30)


def here(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.bench.bench_wan", *words)


def measure_link_use(profile: dict[str, object], turns: int) -> dict[str, object]:
    size = int(str(profile["mbytes"])) << 20
    with tempfile.TemporaryDirectory() as name, link(profile) as (a, b, pid):
        make_dev_pki(Path(name) / "pki", [f"s{n}" for n in range(4)], [HOST], datetime.now(UTC))
        delay_bytes = float(str(profile["rate-mbit"])) * float(str(profile["rtt-ms"])) * 125
        sizes = [str(number) for number in (int(WARM_DELAYS * delay_bytes), size, *[size // 4] * 4)]
        with process(a, *here("--serve", name, *sizes)) as server:
            facts = {**said(server), "link_pid": pid}
            words = here("--link-use", name, json.dumps(facts), str(turns))
            with process(b, *words) as client:
                rows: dict[str, list[dict[str, float]]] = said(client)  # type: ignore[assignment]
    best = {key: statistics.median(row["wall"] for row in values) for key, values in rows.items()}
    return {
        **profile,
        "seconds": rows,
        "raw_mbit_s": size * 8 / 1e6 / best["raw"],
        **{f"{key}_of_raw": best["raw"] / seconds for key, seconds in best.items() if key != "raw"},
    }


def measure_against(profile: dict[str, object], traces: Path, turns: int) -> dict[str, object]:
    """One version by delta, by HTTP, by rsync: seconds from the moment when the learner begins to publish it."""
    for program in ("nginx", "curl", "rsync"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: apt-get install nginx-light curl rsync")
    with tempfile.TemporaryDirectory() as name, link(profile) as (a, b, _):
        folder = Path(name)
        folder.chmod(0o755)
        make_dev_pki(folder / "pki", ["s0"], [HOST], datetime.now(UTC))
        rows = measure_delta(folder, a, b, traces, turns)
        checkpoint = write_checkpoint(trace(traces, 1), folder / "files")
        http, http_verify, rsync = measure_checkpoint(folder, a, b, checkpoint, traces)
    ours = statistics.median(float(str(row["delta_s"])) for row in rows)
    phases = [key for key in rows[0] if key.endswith("_s")]
    return {
        **{key: value for key, value in profile.items() if key != "mbytes"},
        "threads": THREADS,
        "checkpoint_bytes": checkpoint_bytes(traces),
        "delta_bytes": rows[-1]["bytes"],
        **{key: round(statistics.median(float(str(row[key])) for row in rows), 3) for key in phases},
        "turns": rows,
        "http_s": http,
        "http_verify_s": http_verify,
        "rsync_s": rsync,
        "http_over_delta": (http + http_verify) / ours,
        "rsync_over_delta": rsync / ours,
    }


def checkpoint_bytes(traces: Path) -> int:
    return sum(tensor.nbytes for tensor in trace(traces, 0).values())


def measure_checkpoint(folder: Path, a: str, b: str, checkpoint: Path, traces: Path) -> tuple[float, float, float]:
    """Seconds of curl, of hashing what it brought, and of rsync onto the version before."""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, host=HOST))
    (folder / "rsyncd.conf").write_text(RSYNC.format(folder=folder, host=HOST))
    inside = ("ip", "netns", "exec", b)
    fetched = folder / "fetched.safetensors"
    with (
        process(a, "nginx", "-p", str(folder), "-c", f"{folder}/nginx.conf"),
        process(a, "rsync", "--daemon", "--no-detach", f"--config={folder}/rsyncd.conf"),
    ):
        time.sleep(1.0)
        http = seconds_of(*inside, "curl", "-sf", "-o", str(fetched), f"http://{HOST}:8080/{checkpoint.name}")
        http_verify = seconds_of("sha256sum", str(fetched))
        mirror = write_checkpoint(trace(traces, 0), folder / "mirror")
        rsync = seconds_of(
            *inside,
            "rsync",
            "--inplace",
            "--no-whole-file",
            f"rsync://{HOST}:8730/files/{checkpoint.name}",
            str(mirror),
        )
    for copy in (fetched, mirror):
        subprocess.run(("cmp", str(copy), str(checkpoint)), check=True)
    return http, http_verify, rsync


def measure_delta(folder: Path, a: str, b: str, traces: Path, turns: int) -> list[dict[str, object]]:
    """Back and forth between the two versions: each turn is a delta of the same size. Seconds of each phase."""
    rows: list[dict[str, object]] = []
    with process(a, *here("--traces", str(traces), "--serve", str(folder), str(WARM_AGAINST))) as server:
        facts = said(server)
        words = here("--traces", str(traces), "--follow", str(folder), json.dumps(facts))
        with process(b, *words) as sampler:
            said(sampler)
            for number in range(1, turns + 1):
                tell(sampler, str(number))
                tell(server, str(number))
                out, came = said(server), said(sampler)
                assert out["root"] == came["root"]
                rows.append(phases_of(out, came))
    return rows


def phases_of(out: dict[str, object], came: dict[str, object]) -> dict[str, object]:
    """From what the learner says of a version that went out, and the sampler of one that came; clocks are the same."""
    began, done, reached = (float(str(value)) for value in (out["began"], out["done"], came["reached"]))
    store, following = float(str(out["store_s"])), float(str(came["seconds"]))
    return {
        "bytes": out["bytes"],
        "delta_s": round(reached - began, 3),
        "encode_s": round(done - began - store, 3),
        "store_s": store,
        "announce_s": round(reached - following - done, 3),
        **{key: came[key] for key in ("plan_s", "fetch_s", "apply_s", "check_s", "plan_from")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--profiles", type=int, nargs="*", default=range(len(PROFILES)), help="rows to measure again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--follow", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--link-use", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        folder, *sizes = arguments.serve
        asyncio.run(serve(Path(folder), [int(size) for size in sizes], arguments.traces))
    elif arguments.follow:
        asyncio.run(follow(Path(arguments.follow[0]), json.loads(arguments.follow[1]), arguments.traces))
    elif arguments.link_use:
        folder, facts, turns = arguments.link_use
        print(json.dumps(asyncio.run(link_use(Path(folder), json.loads(facts), int(turns)))), flush=True)
    else:
        measure_all(arguments)


def measure_all(arguments: argparse.Namespace) -> None:
    """Rows that are not measured again keep what they were."""
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"link_use": {}, "against": {}}

    def keep(section: str, key: str, row: dict[str, object]) -> None:
        results[section][key] = {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2), **row}
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")

    for name, traces in (("84M", arguments.traces), ("596M", arguments.large)):
        if traces is not None:
            keep("against", name, measure_against(PROFILES[0], traces, arguments.turns))
    for number in arguments.profiles:
        keep("link_use", str(number), measure_link_use(PROFILES[number], arguments.turns))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

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
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.runtime.address import Address
from services.runtime.errors import UnavailableError
from services.sampler.follower import Follower
from services.sampler.object_cache import ObjectCache
from services.sampler.plan_fetch import fetching
from services.sampler.tally import Tally
from services.sampler.weight_sources import WeightSources
from services.wire.credentials import channel_credentials, server_credentials
from services.wire.delta import BitTensor, Weights, read_weights, write_weights
from services.wire.pki import make_dev_pki
from services.wire.tls import TlsFiles
from services.wire.types import Manifest, ObjectRef, Plan, PlanStep, SignedManifest, UpdateKind
from tests.bench.bench_transfer import raw_s, send_raw
from tests.bench.tun_link import ADDRESSES
from tests.support.weight_site import RUN_ID, dial, learner_site
from tests.unit.learner.weights_of_tests import make_weights

RESULTS = Path(__file__).parent / "results" / "wan.json"
HOST = ADDRESSES[0]
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
    async with learner_site(folder / "learner", host=HOST, credentials=tls) as site:
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
            began = time.monotonic()
            published = await site.publisher.publish(int(line), versions[int(line)])
            print(json.dumps({"began": began, "done": time.monotonic(), "bytes": published.update_bytes}), flush=True)
        raw.close()


def sources_of(folder: Path, port: int, name: str, channels: int, stack: contextlib.AsyncExitStack) -> WeightSources:
    credentials, _ = channel_credentials(TlsFiles.in_directory(folder / "pki", name))
    stubs: list[WeightServiceStub] = []
    for _ in range(channels):
        channel = dial(Address(host=HOST, port=port), name, credentials)
        stack.push_async_callback(channel.close)
        stubs.append(WeightServiceStub(channel))
    return WeightSources(stubs[0], lanes=stubs[1:])


async def fetch_s(
    folder: Path, port: int, warm: ObjectRef, plans: Sequence[Sequence[ObjectRef]], channels: int = 1
) -> float:
    """One sampler for each of `plans`, at the same time, to verified files on disk, on warm connections."""
    async with contextlib.AsyncExitStack() as stack:
        name = tempfile.mkdtemp(dir=folder)
        caches = [
            ObjectCache(Path(name) / str(n), sources_of(folder, port, f"s{n}", channels, stack), 1 << 30)
            for n in range(len(plans))
        ]
        await asyncio.gather(*(fetch(cache, [warm], channels) for cache in caches))
        began = time.perf_counter()
        await asyncio.gather(*(fetch(cache, refs, channels) for cache, refs in zip(caches, plans, strict=True)))
        return time.perf_counter() - began


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


def cpu_s(pid: int) -> float:
    """Processor time of a process and all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def link_use(folder: Path, facts: dict[str, object], turns: int) -> dict[str, list[dict[str, float]]]:
    """In the sampler's namespace: wall seconds of each way, in turn, and every process's processor seconds in them."""
    port = int(str(facts["port"]))
    warm, whole, *quarters = [ObjectRef(**row) for row in facts["objects"]]  # type: ignore[attr-defined]
    pids = {"sender": int(str(facts["pid"])), "receiver": os.getpid(), "link": int(str(facts["link_pid"]))}
    ways: dict[str, Callable[[], Coroutine[object, object, float]]] = {
        "raw": lambda: raw_s(int(str(facts["raw_port"])), whole.size_bytes, HOST, warm.size_bytes),
        "one": lambda: fetch_s(folder, port, warm, [quarters]),
        "four": lambda: fetch_s(folder, port, warm, [[ref] for ref in quarters]),
        "one_with_four_channels": lambda: fetch_s(folder, port, warm, [quarters], 4),
        "one_object": lambda: fetch_s(folder, port, warm, [[whole]]),
    }
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, measure in ways.items():
            before = {name: cpu_s(pid) for name, pid in pids.items()}
            wall = await measure()
            cpu = {f"{name}_cpu": round(cpu_s(pid) - before[name], 2) for name, pid in pids.items()}
            rows[way].append({"wall": wall, **cpu})
    return rows


class NoEngine:
    """Takes what it is given: what is measured ends with verified weights."""

    async def load(self, weights: Weights, version: int, root: str) -> float:
        del weights, version, root
        return 0.0


async def follow(folder: Path, facts: dict[str, object]) -> None:
    """In the sampler's namespace: version 0, then for each line on standard input the moment when it is verified."""
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        sources = sources_of(folder, int(str(facts["port"])), "s0", 1, stack)
        follower = Follower(
            sources=sources,
            cache=ObjectCache(folder / "sampler", sources, 1 << 30),
            tally=Tally(),
            run_id=RUN_ID,
            public_key=bytes.fromhex(str(facts["public_key"])),
            news=asyncio.Event(),
        )
        running = [tasks.create_task(follower.watch())]
        await follower._note_loaded(await follower.first())
        running.append(tasks.create_task(follower.follow(NoEngine())))  # type: ignore[arg-type]
        print(json.dumps({"version": 0}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await follower.reached(int(line))
            print(json.dumps({"reached": time.monotonic(), "root": follower.root}), flush=True)
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


def measure_against(profile: dict[str, object], traces: Path) -> dict[str, object]:
    """One version by delta, by HTTP, by rsync: seconds from the moment when the learner begins to publish it."""
    for program in ("nginx", "curl", "rsync"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: apt-get install nginx-light curl rsync")
    with tempfile.TemporaryDirectory() as name, link(profile) as (a, b, _):
        folder = Path(name)
        folder.chmod(0o755)
        make_dev_pki(folder / "pki", ["s0"], [HOST], datetime.now(UTC))
        old, new = (trace(traces, n) for n in (0, 1))
        checkpoint = write_checkpoint(new, folder / "files")
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, host=HOST))
        (folder / "rsyncd.conf").write_text(RSYNC.format(folder=folder, host=HOST))
        result = measure_delta(folder, a, b, traces)
        inside = ("ip", "netns", "exec", b)
        with (
            process(a, "nginx", "-p", name, "-c", f"{name}/nginx.conf"),
            process(a, "rsync", "--daemon", "--no-detach", f"--config={name}/rsyncd.conf"),
        ):
            time.sleep(1.0)
            fetched = folder / "fetched.safetensors"
            http = seconds_of(*inside, "curl", "-sf", "-o", str(fetched), f"http://{HOST}:8080/{checkpoint.name}")
            http_verify = seconds_of("sha256sum", str(fetched))
            mirror = write_checkpoint(old, folder / "mirror")
            rsync = seconds_of(
                *inside, "rsync", "--inplace", "--no-whole-file", f"rsync://{HOST}:8730/files/{checkpoint.name}", mirror
            )
            assert mirror.read_bytes() == fetched.read_bytes() == checkpoint.read_bytes()
    ours = float(str(result["delta_s"]))
    return {
        **{key: value for key, value in profile.items() if key != "mbytes"},
        "checkpoint_bytes": sum(tensor.nbytes for tensor in new.values()),
        **result,
        "http_s": http,
        "http_verify_s": http_verify,
        "rsync_s": rsync,
        "http_over_delta": (http + http_verify) / ours,
        "rsync_over_delta": rsync / ours,
    }


def measure_delta(folder: Path, a: str, b: str, traces: Path) -> dict[str, object]:
    with process(a, *here("--traces", str(traces), "--serve", str(folder))) as server:
        facts = said(server)
        with process(b, *here("--follow", str(folder), json.dumps(facts))) as sampler:
            said(sampler)
            tell(sampler, "1")
            tell(server, "1")
            published, reached = said(server), said(sampler)
    moments = {key: float(str(published[key])) for key in ("began", "done")} | {"end": float(str(reached["reached"]))}
    return {
        "delta_bytes": published["bytes"],
        "delta_s": moments["end"] - moments["began"],
        "delta_publish_s": moments["done"] - moments["began"],
        "delta_after_announcement_s": moments["end"] - moments["done"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
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
        asyncio.run(follow(Path(arguments.follow[0]), json.loads(arguments.follow[1])))
    elif arguments.link_use:
        folder, facts, turns = arguments.link_use
        print(json.dumps(asyncio.run(link_use(Path(folder), json.loads(facts), int(turns)))), flush=True)
    else:
        results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"link_use": {}}
        results["machine"] = {"cpus": os.cpu_count(), "load_1m": os.getloadavg()[0]}
        if arguments.traces:
            results["against"] = measure_against(PROFILES[0], arguments.traces)
        for number in arguments.profiles:
            results["link_use"][str(number)] = measure_link_use(PROFILES[number], arguments.turns)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

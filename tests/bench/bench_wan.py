"""Weights over the kernel's own TCP on an emulated wide-area link: link use, and what a user would pick instead.

    python -m tests.bench.bench_wan [--traces DIR] [--large DIR] [--turns 5] [--against-turns 15]     (Linux, as root)

Two network namespaces joined by tests/bench/tun_link.py; all parts over mutual TLS as shipped, raw TCP without.
`link_use`: the bytes of a keyframe, in four objects (it has one for each 64 MiB of the model), by one sampler, by four
that each fetch all of them, by four with a quarter each, by one with four channels; in one object by one; raw TCP over
one connection, and over four that carry all bytes each; in turn, connections open and warm. Beside the seconds stands
what each process took of the processor in them.
`against`: the learner publishes the next version of a policy, and a sampler follows to verified weights, with the
seconds of each phase; beside it curl fetches the whole checkpoint from nginx (then SHA-256), and rsync updates the old
checkpoint. For 84M parameters (`--traces`, of tests/bench/weight_traces.py) and 596M (`--large`, of large_pair.py);
both folders are made where they are not there. Ends with exit code 69 where something is missing that it needs.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path

from services.wire.delta import BitTensor, write_weights
from services.wire.pki import make_dev_pki
from tests.bench.machine import machine
from tests.bench.wan_ends import HOST, SAMPLERS, THREADS, trace
from tests.bench.wan_needs import sentence_on_missing

RESULTS = Path(__file__).parent / "results" / "wan.json"
WARM_AGAINST = 8 << 20
"""Bytes that the sampler's connection has carried before the delta."""
WARM_DELAYS = 5
"""A connection is warm when it has carried the bytes of so many round trips at the link's rate: both TCP's and gRPC's
windows have grown by then."""
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
        start_new_session=True,  # signals to the terminal's group pass it by: it ends, and cleans up, with its input
    )
    try:
        said(child)
        yield f"{name}-a", f"{name}-b", child.pid
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(30)


def here(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.bench.wan_ends", *words)


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
    copies = {"raw_four": SAMPLERS, "four": SAMPLERS}
    best = {key: statistics.median(row["wall"] for row in values) / copies.get(key, 1) for key, values in rows.items()}
    return {
        **profile,
        "seconds": rows,
        "raw_mbit_s": size * 8 / 1e6 / best["raw"],
        **{f"{key}_of_raw": best["raw"] / seconds for key, seconds in best.items() if key != "raw"},
    }


def measure_against(profile: dict[str, object], traces: Path, turns: int) -> dict[str, object]:
    """One version by delta, by HTTP, by rsync: seconds from the moment when the learner begins to publish it."""
    with tempfile.TemporaryDirectory() as name, link(profile) as (a, b, _):
        folder = Path(name)
        folder.chmod(0o755)
        make_dev_pki(folder / "pki", ["s0"], [HOST], datetime.now(UTC))
        rows = measure_delta(folder, a, b, traces, turns)
        checkpoint = write_checkpoint(trace(traces, 1), folder / "files")
        http, http_verify, rsync = measure_checkpoint(folder, a, b, checkpoint, traces)
    ours = statistics.median(float(str(row["delta_s"])) for row in rows)
    phases = [key for key in rows[0] if key.endswith(("_s", "_mib"))]
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
    """Back and forth between the two versions: each turn is a delta of the same size. Seconds since its beginning."""
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
    following = float(str(came["seconds"]))
    return {
        "bytes": out["bytes"],
        "delta_s": round(reached - began, 3),
        "publish_s": round(done - began, 3),
        "store_s": out["store_s"],
        "first_named_s": round(reached - following - began, 3),
        "last_came_s": round(reached - float(str(came["apply_s"])) - began, 3),
        "learner_more_mib": out["more_mib"],
        "sampler_more_mib": came["more_mib"],
        "plan_from": came["plan_from"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="two versions of 84M parameters, and more (9 GB)")
    parser.add_argument("--large", type=Path, metavar="DIR", help="two versions of 596M parameters (2.4 GB)")
    parser.add_argument("--turns", type=int, default=5, help="of link_use")
    parser.add_argument("--against-turns", type=int, default=15, help="versions that are followed")
    rows = range(len(PROFILES))
    parser.add_argument(
        "--profiles", type=int, nargs="*", choices=rows, default=rows, help="of link_use, all if not named"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in (arguments.traces, arguments.large) if folder is not None]
    if len(folders) > len(set(folders)):
        parser.error("--traces and --large need a folder each: their files have the same names")
    profiles = [PROFILES[number] for number in ([0] if folders else []) + list(arguments.profiles)]
    if sentence := sentence_on_missing(bool(folders), [str(profile["congestion"]) for profile in profiles]):
        print(sentence, file=sys.stderr)
        raise SystemExit(os.EX_UNAVAILABLE)
    if arguments.check:
        return
    make("weight_traces", arguments.traces)
    make("large_pair", arguments.large)
    measure_all(arguments)


def make(maker: str, folder: Path | None) -> None:
    """In a process of its own: torch is not beside a measurement."""
    if folder is not None and subprocess.run((sys.executable, "-m", f"tests.bench.{maker}", str(folder))).returncode:
        raise SystemExit(f"tests.bench.{maker} could not fill {folder}: see above.")


def measure_all(arguments: argparse.Namespace) -> None:
    """Rows that are not measured again keep what they were."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"link_use": {}, "against": {}}

    def keep(section: str, key: str, row: dict[str, object]) -> None:
        results[section][key] = {**machine(), **row}
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")

    for name, traces in (("84M", arguments.traces), ("596M", arguments.large)):
        if traces is not None:
            keep("against", name, measure_against(PROFILES[0], traces, arguments.against_turns))
    for number in arguments.profiles:
        keep("link_use", str(number), measure_link_use(PROFILES[number], arguments.turns))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

"""Memory of a learner's weight service while readers that asked for an object and stopped reading hang on to it.

    python -m tests.bench.bench_memory [--out tests/bench/results/memory.json]

Resident bytes of the service, in a process of its own, before the readers, the most while they hang on, and after they
were cut. Takes some 20 s.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import grpc

from heterorl.v1 import weights_pb2
from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.runtime.address import Address
from services.sampler.weight_sources import WeightSources
from services.wire.channel import channel_options
from services.wire.identity import Identity, Role
from services.wire.types import ObjectRef
from tests.bench.machine import machine
from tests.support.weight_site import dial, learner_site
from tests.unit.learner.weights_of_tests import make_weights

RESULTS = Path(__file__).parent / "results" / "memory.json"
STALLED = 20
STALL_S = 8.0
OBJECT_BYTES = 48 << 20


async def serve(folder: Path) -> None:
    """A weight service with an object of random bytes; ends with its standard input."""
    async with learner_site(folder, stall_s=STALL_S) as site:
        await site.publisher.publish(0, make_weights(1))
        ref = site.store.put(os.urandom(OBJECT_BYTES))
        assert site.store.is_sound(ref)  # as GetPlan checks what it names
        print(json.dumps({"port": site.address.port, "object": asdict(ref)}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@contextlib.asynccontextmanager
async def server(folder: str) -> AsyncGenerator[tuple[int, int, ObjectRef]]:
    """`serve` in a process of its own: its pid, its port, its object."""
    words = ("-m", "tests.bench.bench_memory", "--serve", folder)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        facts = json.loads(await process.stdout.readline())
        yield process.pid, facts["port"], ObjectRef(**facts["object"])
    finally:
        process.stdin.close()
        await process.wait()


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no resident memory")


async def stalled_readers() -> dict[str, object]:
    """Readers with narrow transports that take one chunk each and stop. Resident memory over the time until the cut."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with tempfile.TemporaryDirectory() as name:
        async with server(name) as (pid, port, ref), contextlib.AsyncExitStack() as stack:
            warm = await stack.enter_async_context(dial(Address(host="127.0.0.1", port=port)))
            reader = WeightSources(WeightServiceStub(warm)).learner.readers[0]
            async with contextlib.aclosing(reader.read(ref.object_id, 0)) as chunks:
                async for _ in chunks:
                    pass
            before = resident_bytes(pid)
            calls = []
            for number in range(STALLED):
                identity = Identity(role=Role.SAMPLER, id=f"stalled-{number}")
                channel = grpc.aio.insecure_channel(
                    f"127.0.0.1:{port}", options=[*channel_options("bulk", identity), *options]
                )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
        return
    facts = {**machine(), "grpcio": version("grpcio")}
    results = {"machine": facts, "stalled_readers": asyncio.run(stalled_readers())}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

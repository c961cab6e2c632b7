"""`heterorl relay` as a process: TLS on both sides, health, SIGTERM, and what is said when something is wrong."""

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from heterorl.v1 import weights_pb2
from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.cli import main
from services.monitor.health import is_serving
from services.runtime.address import parse_target
from services.wire.channel import open_channel
from services.wire.credentials import channel_credentials, server_credentials
from services.wire.tls import TlsFiles
from tests.support.weight_site import learner_site
from tests.unit.learner.weights_of_tests import make_weights


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    assert main(["pki", "dev", str(directory), "--sampler", "eu-1"]) == 0
    return directory


@asynccontextmanager
async def relay_process(*words: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.cli", "relay", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={key: value for key, value in os.environ.items() if not key.startswith("HETERORL_")},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_relay_serves_over_tls_and_ends_with_0_on_sigterm(tmp_path: Path, pki: Path) -> None:
    serve, _ = server_credentials(TlsFiles.in_directory(pki, "learner"))
    dial, _ = channel_credentials(own := TlsFiles.in_directory(pki, "eu-1"))
    async with learner_site(tmp_path / "learner", credentials=serve) as site:
        await site.publisher.publish(0, make_weights(1))
        words = ("--upstream", f"localhost:{site.address.port}", "--listen", "127.0.0.1:0", "--tls", str(pki))
        async with relay_process(*words, "--cache", str(tmp_path / "relay"), "--max-bytes", "2000000") as process:
            assert process.stdout is not None
            async with asyncio.timeout(60):
                line = (await process.stdout.readline()).decode().strip()
            assert line.startswith("relay listens on 127.0.0.1:"), line
            address = parse_target(f"localhost:{line.rsplit(':', 1)[1]}")
            assert await is_serving(str(address), own, 20.0)
            async with open_channel(address, dial, "bulk") as channel:
                stub = WeightServiceStub(channel)
                plan = await stub.GetPlan(weights_pb2.GetPlanRequest(run_id="run"), timeout=20)
                ref = plan.steps[0].objects[0]
                request = weights_pb2.FetchObjectRequest(object_id=ref.object_id)
                data = b"".join([chunk.data async for chunk in stub.FetchObject(request)])
            assert hashlib.sha256(data).hexdigest() == ref.object_id
            assert (tmp_path / "relay" / "objects" / ref.object_id).read_bytes() == data
            assert site.traffic.of("relay").bytes_sent == len(data)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                assert await process.wait() == 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--insecure", "--upstream", "learner.example.org"], 2, "the port is missing"),
        (["--insecure", "--upstream", "foo"], 2, "--upstream: 'foo' is not HOST:PORT: the port is missing"),
        (["--insecure", "--listen", "foo"], 2, "--listen: 'foo' is not HOST:PORT: the port is missing"),
        (["--insecure", "--connect.upstream=foo"], 78, "connect.upstream is 'foo', but must be HOST:PORT: the port"),
        (["--insecure", "--listen.metrics_address=foo"], 78, "listen.metrics_address is 'foo', but must be HOST:PORT"),
        (["--insecure", "--cache.dir="], 78, "option --cache.dir: cache.dir is '', but must be a path"),
        (["--insecure", "--upstream", "learner.example.org:7443"], 77, "insecure mode is for loopback"),
        (["--insecure", "--upstream", "127.0.0.1:1", "--listen", "0.0.0.0:0"], 77, "insecure mode is for loopback"),
        (["--upstream", "127.0.0.1:1"], 78, "set [tls]"),
        (["--insecure", "--max-bytes", "lots"], 78, "cache.max_bytes"),
        (["--insecure", "--cache.max_byte=5"], 78, "did you mean cache.max_bytes"),
        (["--tls", "/nowhere", "--listen", "127.0.0.1:0"], 66, "/nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, sentence: str
) -> None:
    assert main(["relay", f"--cache.dir={tmp_path}", *words]) == code
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tls", "--cache"])
def test_an_empty_folder_is_not_the_current_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["relay", option, ""])
    assert ended.value.code == 2
    assert f"argument {option}: the path is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("[connect]\nupstream = 'foo'", 2, "connect.upstream is 'foo', but must be HOST:PORT: the port is missing"),
        ("[connect]\n\nupstream = ''", 3, "connect.upstream is '', but must be HOST:PORT: the port is missing"),
        ("[listen]\naddress = 'h:99999'", 2, "listen.address is 'h:99999', but must be HOST:PORT: port 99999 is not"),
        ("[listen]\nmetrics_address = 'h'", 2, "listen.metrics_address is 'h', but must be HOST:PORT: the port"),
        ("[cache]\ndir = ''", 2, "cache.dir is '', but must be a path"),
        ("connect = 3", 1, "connect is 3, but must be a table"),
        ("cache = 3\nconnect = 'x'", 1, "cache is 3, but must be a table"),
    ],
)
def test_a_wrong_value_in_the_file_is_said_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, line: int, sentence: str
) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(text)
    assert main(["relay", "-c", str(file), "--insecure", "--cache.max_bytes=2000000"]) == 78
    assert f"relay.toml, line {line}: {sentence}" in capsys.readouterr().err

"""A message that claims to be larger than any may be: refused at its five-byte header, not waited for."""

import asyncio
import struct
from pathlib import Path

import pytest

from tests.support.weight_site import following, learner_site
from tests.unit.learner.weights_of_tests import make_weights

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_HEADERS = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A literal that is not indexed, without Huffman codes."""
    return bytes((0, len(name))) + name + bytes((len(value),)) + value


@pytest.mark.parametrize("claimed", [(512 << 20), (1 << 31) - 1, (1 << 32) - 1])
async def test_a_claim_and_then_silence_is_refused_at_once_and_others_are_served(tmp_path: Path, claimed: int) -> None:
    async with learner_site(tmp_path / "learner") as site:
        await site.publisher.publish(0, make_weights(1))
        reader, writer = await asyncio.open_connection(site.address.host, site.address.port)
        words = {
            b":method": b"POST",
            b":scheme": b"http",
            b":path": b"/heterorl.v1.WeightService/GetPlan",
            b":authority": b"localhost",
            b"content-type": b"application/grpc",
            b"te": b"trailers",
            b"user-agent": b"spiffe://heterorl/sampler/eu-1",
        }
        block = b"".join(header(name, value) for name, value in words.items())
        writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, block))
        writer.write(frame(DATA, 0, 1, b"\0" + struct.pack(">I", claimed) + b"some of it"))
        await writer.drain()
        answer = b""
        async with asyncio.timeout(5):
            while b"grpc-status" not in answer:
                data = await reader.read(4096)
                assert data, answer
                answer += data
        status = answer[answer.index(b"grpc-status") + len(b"grpc-status") :]
        assert status[1:2] == b"8", "RESOURCE_EXHAUSTED"
        async with following(tmp_path / "s", site.address, site.public_key) as sampler:
            assert sampler.follower.root == site.root
        writer.close()

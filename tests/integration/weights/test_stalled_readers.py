"""A receiver that stops reading is cut; one that is only slow is not; neither delays another."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from heterorl.v1 import weights_pb2
from heterorl.v1.weights_pb2_grpc import WeightServiceStub
from services.runtime.address import Address
from services.wire.channel import channel_options
from services.wire.identity import Identity, Role
from tests.support.weight_site import learner_site, relay_site
from tests.unit.learner.weights_of_tests import make_weights

STALL_S = 1.0


@asynccontextmanager
async def narrow(address: Address) -> AsyncGenerator[WeightServiceStub]:
    """A channel whose transport takes little more than what is read, so that not reading is felt at the other end."""
    options = [*channel_options("bulk", Identity(role=Role.SAMPLER, id="eu-1")), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(str(address), options=options) as channel:
        yield WeightServiceStub(channel)


@pytest.mark.parametrize("where", ["learner", "relay"])
async def test_a_receiver_that_reads_nothing_is_cut_and_a_slow_one_is_served(tmp_path: Path, where: str) -> None:
    listen = {"stall_s": STALL_S}
    async with (
        learner_site(tmp_path / "learner", stall_s=STALL_S) as site,
        relay_site(tmp_path / "relay", site.address, listen=listen) as relay,
    ):
        await site.publisher.publish(0, make_weights(1))
        ref = site.store.put(bytes(range(256)) * (6 << 12))  # 6 MiB: twelve chunks
        address = site.address if where == "learner" else relay.address
        request = weights_pb2.FetchObjectRequest(object_id=ref.object_id)
        async with narrow(address) as stub, narrow(address) as other:
            stalled = stub.FetchObject(request)
            assert len((await stalled.read()).data) == 512 << 10
            taken = 0
            slow = other.FetchObject(request)
            began = time.monotonic()
            while isinstance(chunk := await slow.read(), weights_pb2.FetchObjectResponse):
                taken += len(chunk.data)
                await asyncio.sleep(STALL_S / 4)
            assert time.monotonic() - began > 2 * STALL_S
            assert taken == ref.size_bytes

            async def read_on() -> None:
                while await stalled.read() is not grpc.aio.EOF:
                    pass

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(read_on(), 10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "took nothing for 1 s" in (caught.value.details() or "")

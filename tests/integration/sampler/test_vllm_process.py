"""The child process of the vLLM engine, as far as it comes without vLLM: its ends, its hangs, its refusals."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from services.sampler.vllm_child.messages import Start
from services.sampler.vllm_child.process import ChildEndedError, VllmProcess

Spawn = Callable[[float], Awaitable[VllmProcess]]


@pytest.fixture
async def spawn() -> AsyncIterator[Spawn]:
    children: list[VllmProcess] = []

    async def begin(stuck_s: float) -> VllmProcess:
        children.append(await VllmProcess.spawn(os.environ, stuck_s))
        return children[-1]

    yield begin
    for child in children:
        await child.close(0)


async def test_a_killed_child_is_seen(spawn: Spawn) -> None:
    child = await spawn(60)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildEndedError, match="out of memory"):
        await child.receive()


async def test_a_child_that_owes_something_and_is_silent_is_killed(spawn: Spawn) -> None:
    child = await spawn(0.4)
    os.kill(child.pid, signal.SIGSTOP)
    child.owes(True)
    watch = asyncio.create_task(child.watch())
    with pytest.raises(ChildEndedError, match=r"no progress for 0\.4 s"):
        await child.receive()
    watch.cancel()


async def test_a_child_that_owes_nothing_may_be_silent(spawn: Spawn) -> None:
    child = await spawn(0.1)
    child.owes(True)
    child.owes(False)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(child.watch(), 0.5)
    child.send({"kind": "stop"})
    with pytest.raises(ChildEndedError, match="exit code 2"):
        await child.receive()


async def test_a_child_without_vllm_says_so(spawn: Spawn) -> None:
    child = await spawn(60)
    child.send(Start(kind="start", model_dir="/", arguments={}, version=0, root="", in_flight=False))
    report = await child.receive()
    assert report["kind"] == "refused"
    assert report["fault"] == "config"
    assert "No module named 'vllm'" in report["message"]


async def test_a_child_ends_when_the_parents_end_of_the_socket_closes(spawn: Spawn) -> None:
    """However the parent ended: the kernel closes its sockets."""
    child = await spawn(60)
    assert await child.hang_up() == 0

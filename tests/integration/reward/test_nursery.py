import asyncio
import socket

from services.reward import nursery
from services.reward.graders import Permissions
from services.reward.worker import Limits


async def test_a_nursery_whose_pool_ended_while_it_started_ends_without_a_word() -> None:
    pool, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = await asyncio.create_subprocess_exec(
        *nursery.arguments(control, Limits(), Permissions()),
        pass_fds=(control.fileno(),),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    control.close()
    pool.close()
    assert await process.communicate() == (b"", b"")
    assert process.returncode == 0

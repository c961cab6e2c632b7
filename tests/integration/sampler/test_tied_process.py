import asyncio
import os
import signal
import sys
import time

_PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-m", "services.sampler.tied_process", str(os.getpid()), *sys.argv[1:]], stdout=subprocess.PIPE
)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
time.sleep(60)
"""
_SAYS_HELLO = ("timeit", "-n1", "-r1", "-s", "print('hello', flush=True)", "__import__('time').sleep(60)")


def _gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_a_tied_process_runs_its_module_and_ends_with_a_parent_that_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, *_SAYS_HELLO, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid, said = (await parent.stdout.readline()).decode().split()
    assert said == "hello"
    assert not _gone(int(pid))
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    deadline = time.monotonic() + 10
    while not _gone(int(pid)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)  # it is no child of ours: no event tells of its end


async def test_a_tied_process_whose_parent_has_ended_already_does_not_begin() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.sampler.tied_process", str(os.getpid() + 1), *_SAYS_HELLO),
        stdout=asyncio.subprocess.PIPE,
    )
    assert await process.communicate() == (b"", None)
    assert process.returncode == 0

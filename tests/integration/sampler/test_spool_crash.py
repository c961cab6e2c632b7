import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from services.runtime.failpoints import VARIABLE
from services.sampler.spool import Spool

_CHILD = """
import asyncio, sys
from pathlib import Path
from services.sampler.spool import Spool

async def main():
    spool = await Spool.open(Path(sys.argv[1]), 1 << 30)
    for index in range(100):
        print(await spool.append(b"group %d" % index), flush=True)
        if index == 4:
            await spool.delete_through(2)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("failpoint", "promised", "on_disk"),
    [
        ("spool.before_commit=3*off->kill", [1, 2, 3], [1, 2, 3]),
        ("spool.after_commit=3*off->kill", [1, 2, 3], [1, 2, 3, 4]),
        ("spool.before_delete_commit=kill", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ("spool.after_commit=7*off->kill", [1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 8]),
    ],
)
async def test_a_killed_sampler_keeps_every_group_that_it_promised(
    tmp_path: Path, failpoint: str, promised: list[int], on_disk: list[int]
) -> None:
    path = tmp_path / "spool.db"
    child = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", _CHILD, str(path)], env={VARIABLE: failpoint}, capture_output=True
    )
    assert child.returncode == -9
    assert [int(line) for line in child.stdout.split()] == promised
    spool = await Spool.open(path, 1 << 30)
    groups = await spool.read_from(1, 1 << 30)
    assert [group.seq for group in groups] == on_disk
    assert [group.payload for group in groups] == [b"group %d" % (seq - 1) for seq in on_disk]
    assert await spool.append(b"after the crash") == on_disk[-1] + 1
    await spool.close()

"""SIGKILL inside a commit, in a real process: what the next process finds is all of the commit, or nothing of it."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.learner.journal import Journal
from tests.support.journal_rows import RUN, group_row


async def commit_groups(path: Path, count: int) -> None:
    """What the child does: one commit for each group, and a line for each that it may acknowledge."""
    journal, recovered = await Journal.open(path, RUN)
    first = recovered.heads.get(("eu-1", "spool"), 0) + 1
    for seq in range(first, first + count):
        await journal.commit([group_row(seq)], [])
        print(seq, flush=True)
    await journal.close()


def run_child(path: Path, failpoints: str) -> tuple[int, list[int]]:
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        env=os.environ | {"HETERORL_FAILPOINTS": failpoints, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    return done.returncode, [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize(("point", "committed"), [("journal.before_commit", 2), ("journal.after_commit", 3)])
async def test_a_kill_at_the_commit_leaves_all_of_it_or_nothing(tmp_path: Path, point: str, committed: int) -> None:
    path = tmp_path / "journal.sqlite3"
    code, acknowledged = run_child(path, f"{point}=2*off->kill")
    assert (code, acknowledged) == (-signal.SIGKILL, [1, 2])
    journal, recovered = await Journal.open(path, RUN)
    assert recovered.heads == {("eu-1", "spool"): committed}
    assert recovered.learner_epoch == 2
    assert [row.payload for row in await journal.pending()] == [f"group {n}".encode() for n in range(1, committed + 1)]
    await journal.close()
    assert run_child(path, "")[1] == [committed + 1, committed + 2, committed + 3, committed + 4]


if __name__ == "__main__":
    asyncio.run(commit_groups(Path(sys.argv[1]), 4))

"""Atomic writes and owned folders."""

import multiprocessing
import os
import stat
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from services.runtime.errors import StorageError, UnavailableError
from services.runtime.files import atomic_write, locked_directory, storage_errors


def test_a_write_replaces_the_content_sets_the_mode_and_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "key.pem"
    atomic_write(path, b"old")
    atomic_write(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["key.pem"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_may_be_read_by_whom_the_umask_says(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_write_that_fails_keeps_the_old_content_and_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "child").touch()
    with pytest.raises(StorageError, match=r"cannot write .*taken: "):
        atomic_write(tmp_path / "taken", b"x")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_missing_folder_and_a_full_disk_are_one_sentence(tmp_path: Path):
    with pytest.raises(StorageError, match="No such file or directory"):
        atomic_write(tmp_path / "absent" / "file", b"x")
    full = pytest.raises(
        StorageError, match=r"cannot write /dev/full: No space left on device: free disk space, or inodes \(df -i\)"
    )
    with full, storage_errors("write /dev/full"):
        Path("/dev/full").write_bytes(b"x")


def hold(directory: Path, report: Connection) -> None:
    """Another process: owns the folder until it is killed."""
    with locked_directory(directory):
        report.send("owned")
        report.recv()


def test_a_second_process_is_told_the_first_ones_pid_and_a_killed_one_leaves_no_lock(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=hold, args=(tmp_path / "state", theirs))
    owner.start()
    try:
        assert ours.poll(60)
        in_use = pytest.raises(StorageError, match=f"state is in use by process {owner.pid}: stop that process")
        with in_use, locked_directory(tmp_path / "state"):
            pass
    finally:
        owner.kill()
        owner.join()
    with locked_directory(tmp_path / "state"):
        assert (tmp_path / "state" / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_can_be_owned_again_after_the_block(tmp_path: Path):
    for _ in range(2):
        with locked_directory(tmp_path):
            pass


def test_what_a_killed_owner_was_writing_is_removed_by_the_next_and_nothing_else(tmp_path: Path):
    (tmp_path / ".manifest-key.pem.0123456789abcdef.tmp").touch()
    (tmp_path / ".mine.tmp").touch()
    with locked_directory(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", ".mine.tmp"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot use folder"), locked_directory(tmp_path / "file" / "state"):
        pass


def test_a_link_that_breaks_while_a_file_is_written_is_no_fault_of_the_disk():
    with pytest.raises(UnavailableError, match="the link broke"), storage_errors("write x"):
        raise UnavailableError("the link broke")

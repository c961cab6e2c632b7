"""The inside of the sandbox: started by path with `python -I -S`, imports the standard library only.

    outer (the worker's child)                     inner (process 1 of its own namespaces)
    unshare: mounts, network, processes  ──►  a root of its own: interpreter and libraries, read-only; /tmp in memory
    waits                                     resource limits; a user of its own; no capabilities; no new privileges
                                              runs the program, then the calls or the asserts

What it does not protect from is listed in docs/rewards.md. argv[1]: descriptor of the job, argv[2]: of the results.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import types
from contextlib import suppress

EXIT_NO_NAMESPACES = 96
EXIT_PROGRAM_FAILED = 97
NOBODY = 65534
USERS = 0x70000000
"""From here on 2^28 user ids that no system gives to anybody. The kernel counts processes by user, and a program must
not use up those of another one that runs beside it."""
TMP_BYTES = 16 << 20
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")

_CLONE = {
    "mounts": 0x20000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pids": 0x20000000,
    "net": 0x40000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC = 1, 2, 4, 8, 32, 4096, 16384
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 1, 38, 24
_CAPABILITY_VERSION_3 = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if one is None else one.encode() for one in (source, target, kind)]
    _call("mount", *encoded, ctypes.c_ulong(flags), None if data is None else data.encode())


def _unshare() -> None:
    """New namespaces; as an ordinary user inside a user namespace."""
    user, group = os.geteuid(), os.getegid()
    flags = sum(value for name, value in _CLONE.items() if name != "user" or user != 0)
    _call("unshare", ctypes.c_int(flags))
    if user != 0:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def _own_root(interpreter: str) -> None:
    """A root that holds the interpreter and the system's libraries and nothing else of the host."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    paths = [path for path in (*SYSTEM, interpreter, *DEVICES) if os.path.exists(path)]
    # Opened before a mount may hide them.
    sources = {path: os.open(path, os.O_PATH) for path in paths if not os.path.islink(path)}
    links = {path: os.readlink(path) for path in paths if os.path.islink(path)}
    root = "/tmp"
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={TMP_BYTES},mode=755")
    for path, target in links.items():
        os.symlink(target, root + path)
    for path, source in sources.items():
        inside = root + path
        if os.path.exists(inside):
            continue  # below a folder that is there already
        directory = os.path.isdir(f"/proc/self/fd/{source}")
        os.makedirs(inside if directory else os.path.dirname(inside), exist_ok=True)
        if not directory:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
        # With what is mounted below (a container's init in /usr/sbin): the kernel shows no user what that covers.
        _mount(f"/proc/self/fd/{source}", inside, None, _MS_BIND | _MS_REC)
        device = 0 if path in DEVICES else _MS_RDONLY | _MS_NODEV
        for place, kept in _mounts_at(inside).items():
            try:
                _mount("none", place, None, _MS_BIND | _MS_REMOUNT | _MS_NOSUID | device | kept)
            except OSError as error:
                if place == inside or error.errno not in (errno.ENOENT, errno.EINVAL):
                    raise  # those two: another mount covers it, no path leads there
        os.close(source)
    for path in ("/tmp", "/proc", "/old"):
        os.makedirs(root + path, exist_ok=True)
    _mount("tmpfs", root + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={TMP_BYTES},mode=1777")
    with suppress(OSError):  # a container that masks parts of /proc forbids a fresh one, and nothing here needs it
        _mount("proc", root + "/proc", "proc", _MS_NOSUID | _MS_NODEV)
    os.chdir(root)
    _call("pivot_root", b".", b"old")
    os.chdir("/")
    _call("umount2", b"/old", ctypes.c_int(_MNT_DETACH))
    os.rmdir("/old")
    _mount("none", "/", None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _mounts_at(path: str) -> dict[str, int]:
    """What is mounted at `path` and below it, with the flag that a remount may not take away. Of several at one place
    the uppermost, which the kernel names last."""
    with open("/proc/self/mountinfo", "rb") as file:
        rows = [line.split() for line in file]
    found = [(os.fsdecode(row[4].decode("unicode_escape").encode("latin-1")), row[5].split(b",")) for row in rows]
    inside = [(place, options) for place, options in found if place == path or place.startswith(path + "/")]
    return {place: _MS_NOEXEC if b"noexec" in options else 0 for place, options in inside}


def _limit(job: dict[str, object]) -> None:
    for what, value in (
        (resource.RLIMIT_CPU, job["cpu_s"]),
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 16),
        (resource.RLIMIT_CORE, 0),
    ):
        assert isinstance(value, int)
        resource.setrlimit(what, (value, value))


def _drop_privileges(isolated: bool) -> None:
    if isolated:
        for capability in range(64):
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        # Limits alone do not end a program's processes: as one user, all that outlive their runs are 16.
        user = USERS + int.from_bytes(os.urandom(4), "big") % (1 << 28) if isolated else NOBODY
        try:
            os.setresuid(user, user, user)
        except OSError:  # a container that knows few users
            os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _call("capset", header, nothing)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # After the change of user, which clears it.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _run(job: dict[str, object], results: int) -> None:
    calls, asserts = job["calls"], job["asserts"]
    assert isinstance(calls, list)
    assert isinstance(asserts, list)
    # What is asked for its functions is imported: what stands under `if __name__ == "__main__"` does not run.
    program = types.ModuleType("program" if calls or asserts else "__main__")
    sys.modules[program.__name__] = program
    sys.argv = ["program.py"]  # a program with arguments may read them as files instead of its standard input
    scope = program.__dict__
    scope["__file__"] = sys.argv[0]
    # Without `site`, which is not imported here, these are missing.
    scope["exit"] = scope["quit"] = sys.exit
    exec(compile(str(job["program"]), "program.py", "exec"), scope)
    for function, arguments in calls:
        try:
            value = scope[function](*arguments)  # type: ignore[operator]
            line = json.dumps({"value": value})
        except Exception as error:  # one call's failure is one case's
            line = json.dumps({"error": f"{type(error).__name__}: {error}"[:200]})
        os.write(results, line.encode() + b"\n")
    for statement in asserts:
        exec(compile(statement, "asserts.py", "exec"), scope)
        os.write(results, json.dumps({"passed": job["nonce"]}).encode() + b"\n")


def main() -> int:
    """Returns the exit code: 0, EXIT_NO_NAMESPACES, or EXIT_PROGRAM_FAILED with the exception's last line on stderr."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        job = json.load(file)
    isolated = True
    try:
        _unshare()
    except OSError as error:
        if not job["rlimits_suffice"]:
            print(f"namespaces cannot be made here ({error})", file=sys.stderr)
            return EXIT_NO_NAMESPACES
        isolated = False
    inner = os.fork()
    if inner:
        _, status = os.waitpid(inner, 0)
        return os.waitstatus_to_exitcode(status) % 256
    try:
        if isolated:
            _own_root(job["interpreter"])
        _drop_privileges(isolated)
        _limit(job)
    except OSError as error:
        print(f"the sandbox cannot be made here ({error})", file=sys.stderr)
        return EXIT_NO_NAMESPACES
    try:
        _run(job, int(sys.argv[2]))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:  # the end of this process
        print(f"{type(error).__name__}: {error}"[:300], file=sys.stderr)
        return EXIT_PROGRAM_FAILED
    return 0


if __name__ == "__main__":
    # An ordinary end: threads of the program are waited for, and what it registered with atexit runs.
    sys.exit(main())

"""The grader `code` in its real sandbox: right and wrong programs, and programs that attack."""

import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from services.reward import sandbox
from services.reward.graders import Permissions, build, check_gold
from services.reward.graders.base import Verdict
from services.reward.scorer import ScoreRequest
from services.reward.spec import GraderSpec

ALLOWED = Permissions(code="isolated")
ADD = {
    "calls": [
        {"function": "add", "arguments": [3, 4], "value": 7},
        {"function": "add", "arguments": [-1, 1], "value": 0},
    ]
}
LIMITS = sandbox.SandboxLimits(cpu_s=1, wall_s=3.0, memory_bytes=256 << 20, rlimits_suffice=False)


def grade(tests: object, completion: str, **options: object) -> Verdict:
    grader = build([GraderSpec(name="code", options=options)], ALLOWED)[0].grader
    return grader.grade(ScoreRequest(prompt="", answer=json.dumps(tests), completion=completion))


def attack(source: str, limits: sandbox.SandboxLimits = LIMITS) -> sandbox.Outcome:
    return sandbox.run(sandbox.Program(source=source), limits)


def test_calls_are_compared_outside_of_the_sandbox() -> None:
    assert grade(ADD, "def add(a, b):\n    return a + b\n").reward == 1.0
    assert grade(ADD, "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.").reward == 1.0
    wrong = grade(ADD, "def add(a, b):\n    return 7\n")
    assert wrong.reward == 0.0
    assert wrong.reason == "1 of 2 tests pass; first failure: add returns another value than wanted"
    assert grade(ADD, "def add(a, b):\n    return 7\n", partial=True).reward == 0.5
    assert "NameError" in grade(ADD, "x = undefined").reason
    assert "KeyError" in grade(ADD, "def sub(a, b): return 0").reason


def test_standard_output_is_compared_line_by_line() -> None:
    tests = {"stdin": [{"in": "3 4\n", "out": "7\n"}, {"in": "1 1\n", "out": "2"}]}
    assert grade(tests, "print(sum(map(int, input().split())), ' ')").reward == 1.0
    assert grade(tests, "print(7)").reward == 0.0
    assert grade(tests, "print(7)", partial=True).reward == 0.5
    assert "SyntaxError" in grade(tests, "print(").reason


@pytest.mark.parametrize("value", ["10**400", "-(10**400)", "float('inf')", "float('nan')", "10**5000"])
def test_a_number_beyond_every_float_is_a_wrong_answer(value: str) -> None:
    tests = {"calls": [{"function": "half", "arguments": [], "value": 0.5}]}
    verdict = grade(tests, f"def half():\n    return {value}\n")
    assert verdict.reward == 0.0


DOCUMENTED = 'def add(a, b):\n    """Adds.\n\n    ```\n    add(3, 4)\n    ```\n    """\n    return a + b\n'


@pytest.mark.parametrize(
    "completion",
    [
        "```python\r\ndef add(a, b):\r\n    return a + b\r\n```\r\n",
        '```python title="add.py"\ndef add(a, b): return a + b\n```',
        "1. The program:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
        "```python\ndef add(a, b): return a + b\n```\nIt prints:\n```\n7\n```",
        "<think>```python\ndef add(a, b): return 0\n```</think>\n```python\ndef add(a, b): return a + b\n```",
        f"```python\n{DOCUMENTED}```",
        "- The program:\n  ```python\n" + textwrap.indent(DOCUMENTED, "  ") + "  ```\n",
        "  ```python\n  def add(a, b): return a + b\n```",
        "```python\ndef add(a, b): return a + b\n  ```\nDone.",
        "```python\ndef add(a, b): return a + b\n```\nFor example:\n```python\nprint(add(3, 4))\n```",
        "```c#\nint Add(int a, int b);\n```\nIn Python:\n```python\ndef add(a, b): return a + b\n```",
    ],
    ids=[
        "CRLF",
        "words behind the language",
        "in a list",
        "its output in a block",
        "another one before",
        "a block in its docstring",
        "a block in its docstring, in a list",
        "its end less indented",
        "its end more indented",
        "an example behind it",
        "a block in C# before",
    ],
)
def test_a_program_is_found_in_the_forms_in_which_policies_write_it(completion: str) -> None:
    assert grade(ADD, completion).reward == 1.0


def test_a_draft_in_thoughts_is_no_program() -> None:
    draft, right = "```python\ndef add(a, b): return a + b\n```", "```python\ndef add(a, b): return b + a\n```"
    assert grade(ADD, f"<think>\n{draft}\n").reward == 0.0
    assert grade(ADD, f"<think>\n{draft}\n</think>\nI do not know.").reward == 0.0
    assert grade(ADD, f"{draft}\nOr so.\n</think>\nI do not know.").reward == 0.0
    assert grade(ADD, f"<think>\n```python\nprint(1)\n```\n</think>\n{right}").reward == 1.0


SPLITS = {"calls": [{"function": "strip", "arguments": ["<think>a</think>b"], "value": "b"}]}
STRIP = "def strip(text):\n    if '<think>' in text:\n        return text.split('</think>')[-1]\n    return text\n"


@pytest.mark.parametrize(
    "completion",
    [
        STRIP,
        "def strip(text): return text.split('</think>')[-1]",
        f"```python\n{STRIP}```\nIt drops what ends with `</think>`.",
        f"<think>\nI split it.\n</think>\n\n```python\n{STRIP}```",
        f"<think>\nI split it.\n</think>\n\n{STRIP}",
        f"I split it.\n</think>\n\n```python\n{STRIP}```",
        f"I split it.\n</think>\n\n{STRIP}",
    ],
    ids=["alone", "one line", "in a block", "thought", "thought, no block", "begun by the prompt", "begun, no block"],
)
def test_a_program_may_hold_the_tags_of_thoughts(completion: str) -> None:
    assert grade(SPLITS, completion).reward == 1.0


def test_what_runs_as_main_does_not_run_where_functions_are_asked_for() -> None:
    program = "def add(a, b): return a + b\nif __name__ == '__main__':\n    print(add(int(input()), 1))"
    assert grade(ADD, program).reward == 1.0
    assert grade({"asserts": ["assert add(3, 4) == 7"]}, program).reward == 1.0
    assert grade({"stdin": [{"in": "3", "out": "4"}]}, program).reward == 1.0


def test_a_program_is_run_without_arguments() -> None:
    tests = {"stdin": [{"in": "3", "out": "4"}]}
    assert grade(tests, "import fileinput\nfor line in fileinput.input(): print(int(line) + 1)").reward == 1.0
    assert grade(tests, "import os\nassert os.path.abspath(__file__)\nprint(int(input()) + 1)").reward == 1.0


def test_a_program_ends_like_any_other() -> None:
    tests = {"stdin": [{"in": "", "out": "7"}]}
    assert grade(tests, "print(7)\nexit()\nprint(8)").reward == 1.0
    assert grade(tests, "import atexit\natexit.register(print, 7)").reward == 1.0
    assert grade(tests, "import threading, time\nthreading.Timer(0.1, print, [7]).start()").reward == 1.0
    assert grade(tests, "print(7)\nquit(1)").reward == 0.0


def test_asserts_must_all_be_reached() -> None:
    tests = {"asserts": ["assert add(3, 4) == 7", "assert add(1, 1) == 2"]}
    assert grade(tests, "def add(a, b): return a + b").reward == 1.0
    assert grade(tests, "def add(a, b): return 7").reward == 0.0
    assert grade(tests, "import os\nos._exit(0)").reward == 0.0
    assert grade(tests, "raise SystemExit(0)").reward == 0.0
    assert grade(tests, "print('{\"passed\": true}')\nimport os\nos._exit(0)").reward == 0.0


@pytest.mark.parametrize(
    "completion",
    ["", "   ", "no code, just ```text\nwords\n```", "```python\ndef add(a, b): return a + b", "```python\n\n```"],
)
def test_a_completion_without_a_whole_program_has_no_reward(completion: str) -> None:
    assert grade(ADD, completion, fence="required").reward == 0.0


@pytest.mark.parametrize(
    "answer", ["", "7", "{}", "[]", '{"calls": []}', '{"stdin": [{"in": 1, "out": ""}]}', '{"call": []}']
)
def test_a_reference_answer_without_tests_is_refused(answer: str) -> None:
    reason = check_gold(answer, [GraderSpec(name="code")], ALLOWED)
    assert reason is not None
    assert reason.startswith("The reference answer")


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "10**10**9",
        "import time\ntime.sleep(60)",
        "import os\nos.fork()\nwhile True: pass",
        "print('x' * (1 << 22))",
        "import os\nwhile True: os.fork()",
        "import os,time\nos.close(1);os.close(2);time.sleep(60)",
        "x = bytearray(1 << 30)",
    ],
    ids=lambda source: source[:24],
)
def test_a_program_that_does_not_end_or_takes_too_much_is_stopped(source: str) -> None:
    started = time.monotonic()
    assert attack(source).problem is not None
    assert time.monotonic() - started < 10


def test_a_program_that_forks_without_end_takes_no_process_from_another() -> None:
    threads = """
import threading, time
several = [threading.Thread(target=time.sleep, args=(0.2,)) for _ in range(4)]
for one in several:
    one.start()
print(len(several))
"""
    bomb = "import os\nprint(flush=True)\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    with ThreadPoolExecutor() as runs:
        beside = runs.submit(attack, bomb)
        while not beside.done():
            assert attack(threads, replace(LIMITS, wall_s=20)).stdout.strip() == "4"


def test_the_host_is_not_visible(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password")
    for path in (str(secret), "/etc/passwd", str(Path(__file__).resolve())):
        assert "FileNotFoundError" in str(attack(f"open({path!r}).read()").problem)
    listed = set(attack("import os\nprint(*os.listdir('/'))").stdout.split())
    interpreter = Path(sys.base_prefix).parts[1]
    assert listed <= {"usr", "lib", "lib64", "bin", "etc", "dev", "proc", "tmp", interpreter}


@pytest.mark.parametrize("path", ["/usr/x", "/x", "/lib/x", "/proc/sys/kernel/core_pattern"])
def test_nothing_but_tmp_can_be_written(path: str) -> None:
    assert "Error" in str(attack(f"open({path!r}, 'w').write('x')").problem)
    own = f"/tmp/sandboxed-{os.getpid()}"  # a name that nobody else gives to a file of the host
    assert attack(f"open({own!r}, 'w').write('x')").problem is None
    assert not Path(own).exists()


def test_there_is_no_network_and_no_other_process() -> None:
    assert "OSError" in str(attack("import socket\nsocket.create_connection(('127.0.0.1', 1), 1)").problem).replace(
        "ConnectionRefusedError", "OSError"
    )
    assert attack("import socket\nprint([name for _, name in socket.if_nameindex()])").stdout.strip() == "['lo']"
    assert "ProcessLookupError" in str(attack(f"import os\nos.kill({os.getpid()}, 0)").problem)
    user, process = attack("import os\nprint(os.getuid(), os.getpid())").stdout.split()
    assert process == "1"
    assert int(user) >= 65534


def test_privileges_and_environment_are_gone() -> None:
    variables = set(attack("import os\nprint(*os.environ)").stdout.split())
    assert variables <= {"LANG", "LC_CTYPE", "PATH", "PYTHONHASHSEED"}
    assert "PermissionError" in str(attack("import os\nos.setuid(0)").problem)
    status = """
import ctypes
libc = ctypes.CDLL(None)
print(libc.prctl(39, 0, 0, 0, 0), [libc.prctl(23, one, 0, 0, 0) for one in range(40)].count(1))
"""
    assert attack(status).stdout.strip() == "1 0"  # no new privileges; not one capability in the bounding set


def test_results_cannot_be_forged_without_knowing_the_values() -> None:
    forger = """
import os
for descriptor in range(3, 32):
    try:
        os.write(descriptor, b'{"value": 1}\\n{"passed": "guess"}\\n')
    except OSError:
        pass
os._exit(0)
"""
    assert grade(ADD, forger).reward == 0.0
    assert grade({"asserts": ["assert False"]}, forger).reward == 0.0


def test_a_host_without_namespaces_is_a_failure_of_the_grader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    call, refusal = '_call("unshare", ctypes.c_int(flags))', 'raise OSError(1, "Operation not permitted")'
    assert call in child
    broken = tmp_path / "child.py"
    broken.write_text(child.replace(call, refusal))
    monkeypatch.setattr(sandbox, "_CHILD", str(broken))
    with pytest.raises(sandbox.SandboxUnavailableError, match="Operation not permitted"):
        attack("print(1)")
    weak = sandbox.SandboxLimits(cpu_s=1, wall_s=3.0, memory_bytes=256 << 20, rlimits_suffice=True)
    assert sandbox.run(sandbox.Program(source="print(1)"), weak).stdout == "1\n"


def test_what_a_container_mounts_below_usr_is_no_obstacle_and_read_only(tmp_path: Path) -> None:
    """As Docker's init in /usr/sbin: the kernel refuses an ordinary user's namespace a copy of /usr without it."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    source = "import os; print(os.listdir('/usr/share')); os.mkdir('/usr/share/made')"
    runs = (
        "from services.reward import sandbox\n"
        f"print(sandbox.run(sandbox.Program(source={source!r}), sandbox.{LIMITS!r}))"
    )
    inner = shlex.join(["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", runs])
    # The second covers what the first two made: it is named among the mounts, and no path leads there.
    covered = f"mount -o bind,noexec {mounted} /usr/share && mount -t tmpfs none /usr/share/man"
    script = f"mkdir {mounted}/man && {covered} && mount -o bind {empty} /usr/share && {inner}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "stdout='[]\\n'" in done.stdout, done
    assert "Read-only file system" in done.stdout

"""`python -m services.sampler.tied_process PARENT_PID MODULE …`: becomes `python -m MODULE …`, ended by the kernel when
its parent ends, however it ends. Grader processes must not outlive the sampler that started them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent = int(sys.argv[1])
    if sys.platform == "linux":  # the setting outlives exec
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == parent:  # else it ended before the line above
        os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])


if __name__ == "__main__":
    main()

"""`python -m services.sampler.tied_process PARENT_PID VERB …`: the heterorl command, ended by the kernel when its
parent ends, however it ends. Grader processes must not outlive the sampler that started them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> int:
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the line above
        return 0
    from services import cli

    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())

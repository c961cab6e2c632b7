"""`heterorl reward`: serves the graders on a socket, or scores the lines of a file."""

import argparse
import math
from pathlib import Path

SOCKET_HELP = "unix:///path of a socket, or HOST:PORT of a loopback address"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`heterorl reward --listen ...` is short for `heterorl reward serve --listen ...`."""
    _add_serve(parser, required=False)
    modes = parser.add_subparsers(dest="mode", metavar="{serve,score}")
    _add_serve(modes.add_parser("serve", help="serve ScoreGroup on a socket"), required=True)
    score = modes.add_parser("score", help="score the lines of a JSONL file")
    score.add_argument(
        "--cases",
        type=Path,
        required=True,
        metavar="FILE",
        help='lines {"completion", "answer"}, optionally "prompt" and "metadata"',
    )
    score.add_argument("--json", action="store_true", help="one JSON line per case instead of a table")
    score.add_argument(
        "--graders", default="math", metavar="NAME|JSON", help='a name, or [{"name", "weight", "options"}, ...]'
    )
    _add_pool(score, argparse.SUPPRESS)


def _add_serve(parser: argparse.ArgumentParser, *, required: bool) -> None:
    # A sub-parser's defaults would overwrite what stands before its name.
    default = argparse.SUPPRESS if required else None
    parser.add_argument("--listen", default=default, metavar="ADDRESS", help=SOCKET_HELP)
    _add_pool(parser, default)


def _add_pool(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument("--workers", type=int, default=default, metavar="N", help="grader processes (default 1)")
    parser.add_argument("--cpu-s", type=float, default=default, metavar="S", help="CPU seconds per answer (default 1)")
    parser.add_argument("--wall-s", type=float, default=default, metavar="S", help="seconds per answer (default 1.7)")
    parser.add_argument(
        "--memory-bytes", type=int, default=default, metavar="N", help="address space of a worker (default 1 GiB)"
    )
    parser.add_argument(
        "--allow-code",
        nargs="?",
        const="isolated",
        default=default,
        choices=("isolated", "rlimits"),
        help="let the grader `code` run programs in its sandbox; rlimits: even where there are no namespaces",
    )
    parser.add_argument(
        "--allow-python",
        action="append",
        default=default,
        metavar="MODULE",
        help="let the grader `python` call functions of this module; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    from services.reward.graders import Permissions
    from services.reward.pool import Pool
    from services.reward.worker import Limits
    from services.runtime.errors import UsageError

    standard = Limits()
    given = (arguments.cpu_s, arguments.wall_s, arguments.memory_bytes, arguments.workers)
    if any(value is not None and not 0 < value < math.inf for value in given):
        raise UsageError("--workers, --cpu-s, --wall-s and --memory-bytes must be above 0, and finite")
    limits = Limits(
        cpu_s=arguments.cpu_s or standard.cpu_s,
        wall_s=arguments.wall_s or standard.wall_s,
        memory_bytes=arguments.memory_bytes or standard.memory_bytes,
    )
    permissions = Permissions(code=arguments.allow_code or "refused", python=tuple(arguments.allow_python or ()))
    pool = Pool(workers=arguments.workers or 1, limits=limits, permissions=permissions)
    if arguments.mode == "score":
        from services.reward.score_file import score_file

        return score_file(arguments.cases, arguments.graders, pool, as_json=arguments.json)
    if arguments.listen is None:
        raise UsageError(f"say where to serve: --listen {SOCKET_HELP}; or score a file: heterorl reward score")
    from services.reward.service import serve
    from services.runtime import log
    from services.runtime.lifecycle import run as run_process

    log.configure(log.LogSection())
    return run_process(lambda process: serve(process, arguments.listen, pool), "reward")

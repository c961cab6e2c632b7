"""The `heterorl` command: finds the verb, parses its arguments, runs it, turns our errors into one sentence."""

import argparse
import errno
import importlib
import io
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.runtime.errors import ExhaustedError, HeteroRLError, StorageError
from services.runtime.terminal import visible

VERBS: dict[str, str] = {
    "learner": "train the policy and serve weights, prompts and acknowledgements",
    "sampler": "generate, score and submit groups for a learner",
    "relay": "serve a learner's weights to one site from a disk cache",
    "reward": "score completions: serve on a socket, or score a file",
    "status": "print a learner's state",
    "health": "ask a service whether it serves",
    "top": "watch a run live in the terminal",
    "why": "say in words why a run is slow or stuck",
    "report": "write a run's report.html",
    "demo": "train a tiny policy over an emulated wide-area network, all on this machine",
    "loss": "evaluate a loss on cases from a file",
    "lab": "experiments: staleness, theory, replay",
    "weights": "diff, apply, inspect and verify weight deltas",
    "admin": "drain or evict a sampler; pause, resume or stop a run",
    "pki": "make certificates",
    "config": "show the resolved configuration, or a commented default file",
}
_SERVERS = ("learner", "relay")
"""They keep gRPC's own lines: nothing else tells of a handshake that was refused. Clients say it themselves."""
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Of a write, which names no file."""


class _Parser(argparse.ArgumentParser):
    """Refuses an empty word for a path, as of an unset shell variable: it would be the current folder."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", Path, _path)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser with the arguments of `verb` only: the other verbs are listed by name, not imported."""
    parser = _Parser(prog="heterorl", description="Reinforcement learning of language models over wide-area networks.")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == verb:
            importlib.import_module(f"services.commands.{name}").add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit codes: docs/operations.md."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no error
    words = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in words if word in VERBS), None)
    if verb not in _SERVERS:
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else a line of gRPC's own for each failed handshake
    parser = build_parser(verb)
    arguments, settings = parser.parse_known_args(words)
    if "overrides" in arguments:  # a verb with a config file (`add_config_arguments`): it judges --section.key=value
        arguments.overrides = settings
    elif settings:
        parser.error(f"unrecognized arguments: {' '.join(settings)}")
    try:
        code = importlib.import_module(f"services.commands.{arguments.verb}").run(arguments)
        if sys.stdout is not None:  # closed by the caller: `>&-`
            sys.stdout.flush()
        return code
    except HeteroRLError as error:
        _say(arguments.verb, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 128 + signal.SIGPIPE
    except MemoryError:
        _say(arguments.verb, "there is not enough memory: free some, or use a larger machine")
        return ExhaustedError.exit_code
    except OSError as error:
        if error.filename is None:
            if error.errno not in _WRITE_ERRORS:
                raise
            _drop_output()
            _say(arguments.verb, f"cannot write: {error.strerror}")
            return StorageError.exit_code
        _say(arguments.verb, f"{error.filename}: {error.strerror}")
        return StorageError.exit_code


def _say(verb: str, sentence: str) -> None:
    print(f"heterorl {verb}: {visible(sentence)}", file=sys.stderr)


def _reader_left() -> bool:
    """Whether nobody reads our output any more, as behind `| head`; then it is dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    _drop_output()
    return True


def _drop_output() -> None:
    """What is left of it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())

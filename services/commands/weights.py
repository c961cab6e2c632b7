"""`heterorl weights`: the weight codec on files. Verbs: diff, apply, inspect, verify."""

import argparse
import json
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.errors import UsageError

if TYPE_CHECKING:
    from services.wire.delta import UpdateInfo, Weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four sub-commands. BASE and NEW are .safetensors files or Hugging Face directories."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    diff = verbs.add_parser("diff", help="write what turns BASE into NEW")
    diff.add_argument("base", type=Path, metavar="BASE")
    diff.add_argument("new", type=Path, metavar="NEW")
    diff.add_argument("-o", "--out", type=Path, required=True, metavar="DELTA", help="a file, or a folder of parts")
    diff.add_argument("--codec", choices=("sx", "xc"), default="sx", help="sx: fast; xc: smaller (default: sx)")
    diff.add_argument("--run-id", type=_run_id, default="", help="name of the run, kept in the delta")
    diff.add_argument("--base-version", type=_version, default=0, help="version number of BASE (default: 0)")
    diff.add_argument("--target-version", type=_version, default=1, help="version number of NEW (default: 1)")
    apply = verbs.add_parser("apply", help="write the weights that DELTA makes of BASE, verified")
    apply.add_argument("base", type=Path, metavar="BASE")
    apply.add_argument("delta", type=Path, metavar="DELTA")
    apply.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="a .safetensors file or a folder")
    inspect = verbs.add_parser("inspect", help="say what a delta or keyframe is")
    inspect.add_argument("delta", type=Path, metavar="DELTA")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    verify = verbs.add_parser("verify", help="check a delta, a keyframe or a checkpoint, and print its root")
    verify.add_argument("path", type=Path, metavar="PATH")
    verify.add_argument("--base", type=Path, help="check that a delta applies to these weights")
    for verb in (diff, apply, verify):
        verb.add_argument("--workers", type=int, default=2, metavar="N", help="threads (default: 2)")


def _version(text: str) -> int:
    from services.wire.delta.update import MAX_VERSION

    number = int(text)
    if not 0 <= number <= MAX_VERSION:
        raise argparse.ArgumentTypeError(f"a version is a number from 0 to {MAX_VERSION}")
    return number


def _run_id(text: str) -> str:
    from services.wire.delta.update import MAX_RUN_ID_CHARS

    if not text.isprintable() or len(text) > MAX_RUN_ID_CHARS:
        raise argparse.ArgumentTypeError(f"a run id is printable text of at most {MAX_RUN_ID_CHARS} characters")
    return text


def run(args: argparse.Namespace) -> int:
    """Runs one sub-command. Raises InputMissingError, BadInputError or StorageError."""
    if getattr(args, "workers", 1) < 1:
        raise UsageError("--workers must be at least 1")
    actions = {"diff": _diff, "apply": _apply, "inspect": _inspect, "verify": _verify}
    with _clean_end():
        return actions[args.action](args)


@contextmanager
def _clean_end() -> Generator[None]:
    """SIGTERM ends as Ctrl-C does: nothing half written is left."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _diff(args: argparse.Namespace) -> int:
    from services.commands.weight_outputs import part_paths, refuse_inputs, write_parts
    from services.wire.delta import inspect, iter_encode, read_weights
    from services.wire.delta.files import weight_files
    from services.wire.delta.layout import plan_parts
    from services.wire.delta.tensors import forms_of

    base, new = read_weights(args.base, mapped=True), read_weights(args.new, mapped=True)
    paths = part_paths(args.out, len(plan_parts(forms_of(new))))
    refuse_inputs(paths, [*weight_files(args.base), *weight_files(args.new)])
    parts = iter_encode(
        base,
        new,
        run_id=args.run_id,
        base_version=args.base_version,
        target_version=args.target_version,
        codec=args.codec,
        workers=args.workers,
    )
    write_parts(args.out, paths, parts)
    _print_info(inspect(paths), f"{args.out}: ")
    return 0


def _apply(args: argparse.Namespace) -> int:
    from services.commands.weight_outputs import find_parts, refuse_inputs, write_checkpoint
    from services.wire.delta import read_weights
    from services.wire.delta.decode import survey
    from services.wire.delta.files import SINGLE_NAME, SUFFIX, weight_files, weights_in_file

    parts = find_parts(args.delta)
    base = read_weights(args.base, mapped=True)
    whole = survey(parts)

    def write(path: Path) -> None:
        with weights_in_file(whole.forms, path) as tensors:
            made = _applied(parts, base, args, tensors)
            if any(made[name] is not tensors[name] for name in made):
                raise RuntimeError("the weights were made beside their file")

    if args.out.name.endswith(SUFFIX):
        of_base = weight_files(args.base)
        refuse_inputs([args.out], [*parts, *(of_base if len(of_base) > 1 else ())])
        write(args.out)
    else:
        refuse_inputs([args.out / SINGLE_NAME], parts)
        write_checkpoint(write, args.base, args.out)
    print(f"{args.out}: version {whole.info.target_version}, root {whole.info.target_root}, verified")
    return 0


def _applied(
    parts: "Sequence[Path]", base: "Weights", args: argparse.Namespace, staging: "Weights | None" = None
) -> "Weights":
    from services.wire.delta import WrongBaseError, apply_update

    try:
        return apply_update(parts, base, workers=args.workers, staging=staging)
    except WrongBaseError as error:
        raise WrongBaseError(f"{args.base}: {error}") from error


def _inspect(args: argparse.Namespace) -> int:
    from services.commands.weight_outputs import find_parts
    from services.wire.delta import inspect

    info = inspect(find_parts(args.delta))
    if args.json:
        print(json.dumps({**asdict(info), "ratio": round(info.ratio, 3)}))
    else:
        _print_info(info, "")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from services.commands.weight_outputs import find_parts
    from services.wire.delta import UpdateKind, apply_update, inspect, read_weights, root_of

    if _is_checkpoint(args.path):
        if args.base is not None:
            raise UsageError(f"--base is for deltas, and {args.path} holds weights: leave it out")
        print(f"{args.path}: sound checkpoint, root {root_of(read_weights(args.path, mapped=True), args.workers)}")
        return 0
    parts = find_parts(args.path)
    info = inspect(parts)
    if args.base is not None:
        _applied(parts, read_weights(args.base, mapped=True), args)
    elif info.kind is UpdateKind.KEYFRAME:
        apply_update(parts, None, workers=args.workers)
    else:
        print(f"{args.path}: sound delta to root {info.target_root}; give --base to check what it makes")
        return 0
    print(f"{args.path}: sound {info.kind.value}, and its weights have the root {info.target_root}")
    return 0


def _is_checkpoint(path: Path) -> bool:
    from services.wire.delta.files import INDEX_NAME, SINGLE_NAME, is_update

    if (path / INDEX_NAME).is_file():
        return True
    file = path if path.is_file() else path / SINGLE_NAME
    return file.is_file() and not is_update(file)


def _print_info(info: "UpdateInfo", prefix: str) -> None:
    base = "" if info.base_version is None else f"{info.base_version} → "
    print(
        f"{prefix}{info.kind.value}, codec {info.codec.value}, version {base}{info.target_version}, "
        f"{info.changed:,} of {info.parameters:,} parameters changed, {info.bytes:,} bytes in {info.shards} part(s), "
        f"{info.ratio:.1f} times smaller than the weights"
    )

"""`heterorl weights`: the weight codec on files. Verbs: diff, apply, inspect, verify."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.errors import InputMissingError, StorageError, UsageError

if TYPE_CHECKING:
    from services.wire.delta import UpdateInfo

SUFFIX = ".safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four sub-commands. BASE and NEW are .safetensors files or Hugging Face directories."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    diff = verbs.add_parser("diff", help="write what turns BASE into NEW")
    diff.add_argument("base", type=_path, metavar="BASE")
    diff.add_argument("new", type=_path, metavar="NEW")
    diff.add_argument("-o", "--out", type=_path, required=True, metavar="DELTA", help="a file, or a folder of parts")
    diff.add_argument("--codec", choices=("sx", "xc"), default="sx", help="sx: fast; xc: smaller (default: sx)")
    diff.add_argument("--run-id", default="", help="name of the run, kept in the delta")
    diff.add_argument("--base-version", type=int, default=0, help="version number of BASE (default: 0)")
    diff.add_argument("--target-version", type=int, default=1, help="version number of NEW (default: 1)")
    apply = verbs.add_parser("apply", help="write the weights that DELTA makes of BASE, verified")
    apply.add_argument("base", type=_path, metavar="BASE")
    apply.add_argument("delta", type=_path, metavar="DELTA")
    apply.add_argument("-o", "--out", type=_path, required=True, metavar="OUT", help="a .safetensors file or a folder")
    inspect = verbs.add_parser("inspect", help="say what a delta or keyframe is")
    inspect.add_argument("delta", type=_path, metavar="DELTA")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    verify = verbs.add_parser("verify", help="check a delta, a keyframe or a checkpoint, and print its root")
    verify.add_argument("path", type=_path, metavar="PATH")
    verify.add_argument("--base", type=_path, help="check that a delta applies to these weights")
    for verb in (diff, apply, verify):
        verb.add_argument("--workers", type=int, default=2, metavar="N", help="threads (default: 2)")


def _path(text: str) -> Path:
    """An empty word, as of an unset shell variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("a path is not empty")
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """Runs one sub-command. Raises InputMissingError, BadInputError or StorageError."""
    if getattr(args, "workers", 1) < 1:
        raise UsageError("--workers must be at least 1")
    actions = {"diff": _diff, "apply": _apply, "inspect": _inspect, "verify": _verify}
    return actions[args.action](args)


def find_parts(path: Path) -> list[Path]:
    """The files of an update: `path` itself, the .safetensors files of a folder, or `NAME-00001-of-00003.safetensors`
    beside the missing `NAME.safetensors`. Raises InputMissingError."""
    if path.is_file():
        return [path]
    if path.is_dir():
        parts = sorted(path.glob(f"*{SUFFIX}"))
    else:
        parts = sorted(path.parent.glob(f"{path.name.removesuffix(SUFFIX)}-[0-9]*-of-[0-9]*{SUFFIX}"))
    if not parts:
        raise InputMissingError(f"there is no weight update at {path}")
    return parts


def part_paths(path: Path, count: int) -> list[Path]:
    """Where the parts of an update go: one file at `path`, or numbered files beside it or in it."""
    if path.name.endswith(SUFFIX):
        if count == 1:
            return [path]
        stem = path.name.removesuffix(SUFFIX)
        return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}") for number in range(1, count + 1)]
    return [path / f"delta-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]


def _diff(args: argparse.Namespace) -> int:
    from services.runtime.files import atomic_write
    from services.wire.delta import inspect, iter_encode, read_weights
    from services.wire.delta.layout import plan_parts
    from services.wire.delta.tensors import forms_of

    if args.out.exists() and any(args.out.resolve() == path.resolve() for path in (args.base, args.new)):
        raise UsageError(f"{args.out} holds the weights to compare: write the delta somewhere else")
    base, new = read_weights(args.base, mapped=True), read_weights(args.new, mapped=True)
    parts = iter_encode(
        base,
        new,
        run_id=args.run_id,
        base_version=args.base_version,
        target_version=args.target_version,
        codec=args.codec,
        workers=args.workers,
    )
    paths = part_paths(args.out, len(plan_parts(forms_of(new))))
    if not args.out.name.endswith(SUFFIX):
        _make_folder(args.out)
    _remove_stale(args.out, paths)
    for path, part in zip(paths, parts, strict=True):
        atomic_write(path, part)
    _print_info(inspect(paths), f"{args.out}: ")
    return 0


def _apply(args: argparse.Namespace) -> int:
    from services.wire.delta import apply_update, inspect, read_weights, write_weights
    from services.wire.delta.files import SINGLE_NAME

    parts = find_parts(args.delta)
    base = read_weights(args.base, mapped=True)
    info = inspect(parts)
    result = apply_update(parts, base, workers=args.workers)
    if args.out.name.endswith(SUFFIX):
        write_weights(result, args.out)
    else:
        _make_folder(args.out)
        if args.base.is_dir() and args.base.resolve() != args.out.resolve():
            _copy_beside(args.base, args.out)
        write_weights(result, args.out / SINGLE_NAME)
        _remove_other_weights(args.out)
    print(f"{args.out}: version {info.target_version}, root {info.target_root}, verified")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from services.wire.delta import inspect

    info = inspect(find_parts(args.delta))
    if args.json:
        print(json.dumps({**asdict(info), "ratio": round(info.ratio, 3)}))
    else:
        _print_info(info, "")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from services.wire.delta import UpdateKind, apply_update, inspect, read_weights, root_of
    from services.wire.delta.files import INDEX_NAME, SINGLE_NAME

    is_model_folder = (args.path / SINGLE_NAME).is_file() or (args.path / INDEX_NAME).is_file()
    if is_model_folder or (args.path.is_file() and not _is_update(args.path)):
        print(f"{args.path}: sound checkpoint, root {root_of(read_weights(args.path, mapped=True), args.workers)}")
        return 0
    parts = find_parts(args.path)
    info = inspect(parts)
    if info.kind is UpdateKind.KEYFRAME or args.base is not None:
        base = None if args.base is None else read_weights(args.base, mapped=True)
        apply_update(parts, base, workers=args.workers)
        print(f"{args.path}: sound {info.kind.value}, and its weights have the root {info.target_root}")
    else:
        print(f"{args.path}: sound delta to root {info.target_root}; give --base to check what it makes")
    return 0


def _is_update(path: Path) -> bool:
    from services.wire.delta.files import read_metadata
    from services.wire.delta.update import FORMAT

    return read_metadata(path).get("format") == FORMAT


def _print_info(info: "UpdateInfo", prefix: str) -> None:
    base = "" if info.base_version is None else f"{info.base_version} → "
    print(
        f"{prefix}{info.kind.value}, codec {info.codec.value}, version {base}{info.target_version}, "
        f"{info.changed:,} of {info.parameters:,} parameters changed, {info.bytes:,} bytes in {info.shards} part(s), "
        f"{info.ratio:.1f} times smaller than the weights"
    )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {path}: {error.strerror}") from error


def _remove_stale(out: Path, paths: Sequence[Path]) -> None:
    """Removes parts of an earlier delta of this name, which would be read as parts of this one; nothing else."""
    folder, stem = (out.parent, out.name.removesuffix(SUFFIX)) if out.name.endswith(SUFFIX) else (out, "delta")
    for path in (*folder.glob(f"{stem}-[0-9]*-of-[0-9]*{SUFFIX}"), folder / f"{stem}{SUFFIX}"):
        if path not in paths and path.is_file() and _is_update(path):
            path.unlink()


def _copy_beside(base: Path, out: Path) -> None:
    """Configuration and tokenizer go with the weights: everything at the top of BASE that is not weights."""
    from services.wire.delta.files import INDEX_NAME

    try:
        for path in base.iterdir():
            if path.is_file() and path.name != INDEX_NAME and not path.name.endswith(SUFFIX):
                shutil.copy2(path, out / path.name)
    except OSError as error:
        raise StorageError(f"cannot copy {base} to {out}: {error.strerror}") from error


def _remove_other_weights(out: Path) -> None:
    """OUT may have been BASE with several files: an index would still point at the old ones."""
    from services.wire.delta.files import INDEX_NAME, SINGLE_NAME

    (out / INDEX_NAME).unlink(missing_ok=True)
    for path in out.glob(f"model-*-of-*{SUFFIX}"):
        if path.name != SINGLE_NAME:
            path.unlink()

"""The arguments by which verbs find a learner and say who they are. Not a verb itself."""

import argparse
from pathlib import Path

from services.runtime.errors import UsageError
from services.wire.tls import TlsFiles


def add_connection_arguments(parser: argparse.ArgumentParser, identity: str = "monitor") -> None:
    """identity: the certificate's name in a folder made by `heterorl pki dev`."""
    parser.add_argument("--learner", default="localhost:7443", metavar="HOST:PORT", help="the learner (localhost:7443)")
    add_tls_arguments(parser, identity)


def add_tls_arguments(parser: argparse.ArgumentParser, identity: str) -> None:
    """--tls, --identity and --insecure."""
    parser.add_argument(
        "--tls", type=Path, metavar="DIR", help="folder of certificates, as `heterorl pki dev` makes it"
    )
    parser.add_argument("--identity", default=identity, help=f"name of our certificate in that folder ({identity})")
    parser.add_argument("--insecure", action="store_true", help="no TLS: loopback addresses only")


def tls_overrides(arguments: argparse.Namespace, *sections: str) -> list[str]:
    """The `--section.key=value` words of a service that --tls and --insecure stand for.

    sections: those whose key `insecure` --insecure sets.
    """
    words = [f"--{section}.insecure=true" for section in sections if arguments.insecure]
    if arguments.tls is not None:
        files = TlsFiles.in_directory(arguments.tls, arguments.identity)
        words += [f"--tls.ca={files.ca}", f"--tls.certificate={files.certificate}", f"--tls.key={files.key}"]
    return words


def tls_of(arguments: argparse.Namespace) -> TlsFiles | None:
    """None for --insecure. Raises UsageError when neither --tls nor --insecure is given."""
    if arguments.insecure:
        return None
    if arguments.tls is None:
        raise UsageError("say --tls DIR (certificates as `heterorl pki dev DIR` makes them), or --insecure on loopback")
    return TlsFiles.in_directory(arguments.tls, arguments.identity)

"""HOST:PORT, as people write it on a command line or in a config file."""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import AfterValidator

from services.runtime.errors import RefusedError, UsageError

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?\.?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    host: str
    """A name, or an IP address without brackets."""
    port: int
    """0 in a listening address takes a free port."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. A name other than localhost is not: DNS may say anything."""
        if self.host.rstrip(".").lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_target(text: str) -> Address:
    """The address of a server to dial: port 1 to 65535. Raises UsageError."""
    return _parse(text, lowest_port=1)


def parse_listen(text: str) -> Address:
    """An address to listen on: port 0 to 65535. Raises UsageError."""
    return _parse(text, lowest_port=0)


def _parse_local(text: str) -> None:
    if not text.startswith("unix:"):
        parse_target(text)
    elif not text.removeprefix("unix:").strip("/"):
        raise UsageError(f"{text!r} is not unix:///path")


def _key_of(parse: Callable[[str], object], *, may_be_empty: bool = False) -> AfterValidator:
    """A config key whose text `parse` takes; it stays text, so that it is shown as it was written."""

    def check(text: str) -> str:
        try:
            if text or not may_be_empty:
                parse(text)
        except UsageError as error:
            raise ValueError(str(error).replace(f"{text!r} is not", "must be", 1)) from None
        return text

    return AfterValidator(check)


TargetKey: TypeAlias = Annotated[str, _key_of(parse_target)]
OptionalTargetKey: TypeAlias = Annotated[str, _key_of(parse_target, may_be_empty=True)]
ListenKey: TypeAlias = Annotated[str, _key_of(parse_listen)]
OptionalLocalKey: TypeAlias = Annotated[str, _key_of(_parse_local, may_be_empty=True)]
"""As OptionalTargetKey, or a Unix socket."""
OptionalListenKey: TypeAlias = Annotated[str, _key_of(parse_listen, may_be_empty=True)]


def require_loopback(address: Address) -> None:
    """Raises RefusedError unless only this machine can reach `address`: the rule of serving or dialing without TLS."""
    if not address.is_loopback:
        raise RefusedError(
            f"insecure mode is for loopback addresses, and {address} is not one: use TLS (`heterorl pki dev`)"
        )


def _parse(text: str, lowest_port: int) -> Address:
    wrong = f"{text!r} is not HOST:PORT"
    if "://" in text:
        raise UsageError(f"{wrong}: leave out the {text.split('://')[0]}://")
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]:")
        if not bracket or not _is_ipv6(host):
            raise UsageError(f"{wrong}: write an IPv6 address as [::1]:7443")
    else:
        host, colon, port = text.rpartition(":")
        if ":" in host:
            raise UsageError(f"{wrong}: write an IPv6 address in brackets, as [::1]:7443")
        if not colon:
            raise UsageError(f"{wrong}: the port is missing, as in {text or 'learner.example.org'}:7443")
        if not _NAME.fullmatch(host):
            raise UsageError(f"{wrong}: {host!r} is not a host name or address" if host else f"{wrong}: no host")
    if not (port.isascii() and port.isdecimal()):
        raise UsageError(f"{wrong}: port {port!r} is not a number")
    if not lowest_port <= int(port) <= 65535:
        raise UsageError(f"{wrong}: port {port} is not between {lowest_port} and 65535")
    return Address(host=host, port=int(port))


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).version == 6
    except ValueError:
        return False

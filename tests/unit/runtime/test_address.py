"""HOST:PORT: what is taken, and the sentence for what is not."""

import pytest
from pydantic import TypeAdapter, ValidationError

from services.runtime.address import (
    Address,
    ListenKey,
    OptionalListenKey,
    TargetKey,
    parse_listen,
    parse_target,
    require_loopback,
)
from services.runtime.errors import RefusedError, UsageError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:7443", "localhost", 7443),
        ("learner.example.org:1", "learner.example.org", 1),
        ("10.0.0.1:65535", "10.0.0.1", 65535),
        ("[::1]:7443", "::1", 7443),
        ("[fe80::1%eth0]:7443", "fe80::1%eth0", 7443),
        ("learner_1:7443", "learner_1", 7443),
    ],
)
def test_an_address_is_read_and_written_as_people_write_it(text: str, host: str, port: int):
    address = parse_target(text)
    assert (address.host, address.port, str(address)) == (host, port, text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("localhost", "the port is missing, as in localhost:7443"),
        ("", "the port is missing"),
        (":7443", "no host"),
        ("localhost:", "port '' is not a number"),
        ("localhost:http", "port 'http' is not a number"),
        ("localhost:٣", "is not a number"),
        ("localhost:-1", "is not a number"),
        ("localhost:0", "port 0 is not between 1 and 65535"),
        ("localhost:65536", "port 65536 is not between 1 and 65535"),
        ("https://localhost:7443", "leave out the https://"),
        ("::1:7443", r"write an IPv6 address in brackets, as \[::1\]:7443"),
        ("[::1]", r"write an IPv6 address as \[::1\]:7443"),
        ("[localhost]:7443", "write an IPv6 address"),
        ("local host:7443", "'local host' is not a host name or address"),
        ("localhost/path:7443", "is not a host name or address"),
        ("-x:7443", "is not a host name"),
    ],
)
def test_a_wrong_address_is_one_sentence_that_says_what_is_wrong(text: str, reason: str):
    with pytest.raises(UsageError, match=reason) as caught:
        parse_target(text)
    assert str(caught.value).startswith(f"{text!r} is not HOST:PORT: ")


def test_a_listening_address_may_ask_for_a_free_port():
    assert parse_listen("127.0.0.1:0").port == 0


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (TargetKey, "localhost:1", ("", "localhost:0", "localhost")),
        (ListenKey, "localhost:0", ("", "localhost", "localhost:65536")),
        (OptionalListenKey, "", ("localhost", ":1")),
    ],
)
def test_a_config_key_takes_what_can_be_dialled_or_bound(kind: object, right: str, wrong: tuple[str, ...]):
    key = TypeAdapter[str](kind)
    assert key.validate_python(right) == right
    for text in wrong:
        with pytest.raises(ValidationError, match="must be HOST:PORT: "):
            key.validate_python(text)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_needs_no_tls(host: str):
    require_loopback(Address(host=host, port=1))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.0.0.1.nip.io"]
)
def test_everything_else_needs_tls(host: str):
    with pytest.raises(RefusedError, match="insecure mode is for loopback addresses"):
        require_loopback(Address(host=host, port=1))

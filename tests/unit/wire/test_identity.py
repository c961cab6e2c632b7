"""Identities as URIs, and the ids that may stand in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import BadInputError, RefusedError
from services.wire.identity import Identity, Role, parse_uri, require_id
from services.wire.interceptors import peer_identity, require_peer_id


@given(st.sampled_from(Role), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_an_identity_survives_its_uri(role: Role, text: str):
    identity = Identity(role=role, id=require_id(text))
    assert parse_uri(identity.uri) == identity


@given(st.text())
def test_text_that_is_no_uri_of_ours_names_nobody(text: str):
    assert parse_uri(text) is None
    assert parse_uri(f"spiffe://heterorl/{text}/x/y") is None


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://heterorl/sampler/",
        "spiffe://heterorl/sampler/a/b",
        "spiffe://heterorl/sampler/../admin",
        "spiffe://heterorl.evil/sampler/a",
        "spiffe://heterorl/Sampler/a",
        "spiffe://heterorl/sampler/a\n",
        "SPIFFE://heterorl/sampler/a",
        "spiffe://heterorl/sampler/" + "a" * 65,
    ],
)
def test_near_misses_name_nobody(uri: str):
    assert parse_uri(uri) is None


@pytest.mark.parametrize("text", ["", ".", "..", "../x", "a/b", "a b", "a\0", "é", "-a", "a" * 65, "a\n"])
def test_an_id_that_could_be_a_path_or_a_trick_is_refused(text: str):
    with pytest.raises(BadInputError, match="is no id"):
        require_id(text)


class Call:
    """What a servicer's context says about a caller."""

    def __init__(self, facts: dict[str, list[bytes]], *metadata: tuple[str, str]) -> None:
        self.facts = facts
        self.metadata = metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return self.facts

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata


ADMIN_AGENT = ("user-agent", "spiffe://heterorl/admin/root grpc-python-asyncio/1.85.1")


def over_tls(*names: bytes) -> Call:
    facts = {"transport_security_type": [b"ssl"], "x509_subject_alternative_name": list(names)}
    return Call(facts, ADMIN_AGENT)


def test_over_tls_only_the_certificate_counts():
    assert peer_identity(over_tls(b"localhost", b"spiffe://heterorl/sampler/s")) == Identity(role=Role.SAMPLER, id="s")


@pytest.mark.parametrize(
    "names", [[], [b"localhost"], [b"spiffe://heterorl/sampler/a", b"spiffe://heterorl/admin/b"], [b"\xff"]]
)
def test_over_tls_a_certificate_without_exactly_one_identity_is_refused(names: list[bytes]):
    with pytest.raises(RefusedError, match="does not name exactly one"):
        peer_identity(over_tls(*names))


def test_a_transport_that_nobody_thought_of_is_refused():
    with pytest.raises(RefusedError):
        peer_identity(Call({"transport_security_type": [b"alts"]}, ADMIN_AGENT))


def test_the_id_in_a_message_must_be_the_callers():
    call = over_tls(b"spiffe://heterorl/sampler/s")
    assert require_peer_id(call, "s").id == "s"
    with pytest.raises(RefusedError, match="the message says it is from 't'"):
        require_peer_id(call, "t")

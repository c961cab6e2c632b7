"""Our own check of our certificates: one sentence for each thing that can be wrong with them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from services.runtime.errors import ConfigError, InputMissingError, RefusedError
from services.wire.certificates import check_to_dial, check_to_serve
from services.wire.identity import Identity, Role
from services.wire.pki import Authority, issue, make_authority, make_dev_pki, write_pair
from services.wire.tls import TlsFiles

NOW = datetime(2026, 1, 15, 12, tzinfo=UTC)
DAY = timedelta(days=1)
SAMPLER = Identity(role=Role.SAMPLER, id="s")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority(NOW - 5 * DAY)


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> TlsFiles:
    write_pair(tmp_path, "ca", authority.certificate, authority.key)
    return leaf(tmp_path, authority, SAMPLER)


def leaf(
    directory: Path, authority: Authority, identity: Identity, start: datetime = NOW - DAY, end: datetime = NOW + DAY
) -> TlsFiles:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = issue(authority, identity, key.public_key(), ["localhost"], start, end)
    write_pair(directory, identity.id, certificate, key)
    return TlsFiles.in_directory(directory, identity.id)


def test_a_good_certificate_says_who_we_are_and_until_when(files: TlsFiles):
    own = check_to_dial(files, NOW)
    assert (own.identity, own.expires) == (SAMPLER, NOW + DAY)
    assert own.key_pem == files.key.read_bytes()


def test_the_last_second_is_valid_and_the_next_is_not(files: TlsFiles):
    check_to_dial(files, NOW + DAY)
    with pytest.raises(RefusedError, match=r"s\.pem expired on 2026-01-16 12:00 UTC: renew it"):
        check_to_dial(files, NOW + DAY + timedelta(seconds=1))


def test_a_certificate_from_the_future_points_at_the_clock(files: TlsFiles):
    with pytest.raises(RefusedError, match=r"valid from 2026-01-14 12:00 UTC, and it is .*: check the clock"):
        check_to_dial(files, NOW - 2 * DAY)


def test_a_certificate_of_another_ca_is_refused(files: TlsFiles, tmp_path: Path):
    other = make_authority(NOW)
    write_pair(tmp_path, "ca", other.certificate, other.key)
    with pytest.raises(RefusedError, match=r"s\.pem was not signed by the authority in .*ca\.pem"):
        check_to_dial(files, NOW)


def test_one_of_several_authorities_is_enough_while_a_ca_is_replaced(files: TlsFiles):
    other = make_authority(NOW).certificate.public_bytes(Encoding.PEM)
    files.ca.write_bytes(other + files.ca.read_bytes())
    assert check_to_dial(files, NOW).identity == SAMPLER


def test_the_key_of_another_certificate_is_refused(files: TlsFiles, tmp_path: Path, authority: Authority):
    other = leaf(tmp_path, authority, Identity(role=Role.SAMPLER, id="other"))
    with pytest.raises(ConfigError, match=r"other-key\.pem does not belong to certificate .*s\.pem"):
        check_to_dial(files.model_copy(update={"key": other.key}), NOW)


def test_roles_are_held_to_their_side(files: TlsFiles, tmp_path: Path, authority: Authority):
    learner = leaf(tmp_path, authority, Identity(role=Role.LEARNER, id="learner"))
    relay = leaf(tmp_path, authority, Identity(role=Role.RELAY, id="relay"))
    assert check_to_serve(learner, NOW).identity.role is Role.LEARNER
    assert check_to_serve(relay, NOW).identity == check_to_dial(relay, NOW).identity
    with pytest.raises(RefusedError, match="is for sampler s, and only learner, relay may use one as a server"):
        check_to_serve(files, NOW)
    with pytest.raises(RefusedError, match=r"is for learner learner, and only .* may use one as a client"):
        check_to_dial(learner, NOW)


def self_made(directory: Path, authority: Authority, *extensions: x509.ExtensionType) -> TlsFiles:
    """A leaf with just these extensions."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder(authority.certificate.subject, name, key.public_key(), 7, NOW - DAY, NOW + DAY)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    write_pair(directory, "x", builder.sign(authority.key, hashes.SHA256()), key)
    return TlsFiles.in_directory(directory, "x")


def test_a_certificate_without_exactly_one_identity_of_ours_is_refused(
    files: TlsFiles, tmp_path: Path, authority: Authority
):
    uris = [["spiffe://other/sampler/s"], ["spiffe://heterorl/emperor/s"], [SAMPLER.uri, SAMPLER.uri + "2"], []]
    for texts in uris:
        names = [x509.UniformResourceIdentifier(text) for text in texts] or [x509.DNSName("localhost")]
        with pytest.raises(RefusedError, match="names no HeteroRL identity"):
            check_to_dial(self_made(tmp_path, authority, x509.SubjectAlternativeName(names)), NOW)
    with pytest.raises(RefusedError, match="names no HeteroRL identity"):
        check_to_dial(self_made(tmp_path, authority), NOW)


def test_a_certificate_without_the_right_usage_is_refused(files: TlsFiles, tmp_path: Path, authority: Authority):
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(SAMPLER.uri)])
    server = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH])
    for extensions in ([name], [name, server]):
        with pytest.raises(RefusedError, match="may not be used as a client: its extended key usage lacks it"):
            check_to_dial(self_made(tmp_path, authority, *extensions), NOW)


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
def test_missing_unreadable_and_broken_files_are_named(files: TlsFiles, tmp_path: Path, name: str):
    absent = files.model_copy(update={name: tmp_path / "absent.pem"})
    with pytest.raises(
        InputMissingError, match=r"there is no file .*absent\.pem: make certificates with `heterorl pki"
    ):
        check_to_dial(absent, NOW)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        check_to_dial(files.model_copy(update={name: tmp_path}), NOW)
    for garbage in (b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        (tmp_path / "broken.pem").write_bytes(garbage)
        with pytest.raises(ConfigError, match=r"broken\.pem is not a PEM (certificate|private key)"):
            check_to_dial(files.model_copy(update={name: tmp_path / "broken.pem"}), NOW)


def test_a_key_with_a_password_says_so(files: TlsFiles):
    key = ec.generate_private_key(ec.SECP256R1())
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    with pytest.raises(ConfigError, match="has a password: store it without"):
        check_to_dial(files, NOW)


def test_an_expired_authority_is_named(tmp_path: Path):
    make_dev_pki(tmp_path, ["s"], [], NOW - timedelta(days=3640))
    late = NOW + timedelta(days=20)
    authority = tmp_path / "ca.pem"
    key = x509.load_pem_x509_certificate(authority.read_bytes())
    assert key.not_valid_after_utc < late
    with pytest.raises(RefusedError, match="expired on"):
        check_to_dial(TlsFiles.in_directory(tmp_path, "s"), late)

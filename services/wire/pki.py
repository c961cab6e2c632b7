"""A certificate authority on disk, and leaf certificates that carry our identities.

    DIR/ca.pem  DIR/ca-key.pem  DIR/NAME.pem  DIR/NAME-key.pem      keys have mode 0600

Keys are ECDSA P-256. Making a folder again keeps what still holds, so it is safe to repeat.
"""

import enum
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.runtime.errors import ConfigError, HeteroRLError, UsageError
from services.runtime.files import atomic_write, storage_errors
from services.wire.certificates import (
    alternative_names,
    check_to_dial,
    check_to_serve,
    is_issued_by,
    parse_certificates,
    parse_key,
    public_bytes,
    read_pem,
    require_in_time,
)
from services.wire.identity import DIALING_ROLES, SERVING_ROLES, Identity, Role
from services.wire.tls import TlsFiles

CA_LIFE = timedelta(days=3650)
LEAF_LIFE = timedelta(days=90)
RENEW_BEFORE = timedelta(days=30)
"""A leaf with less life left than this is made anew."""
_BACKDATE = timedelta(minutes=5)
"""Clocks of other hosts may be a little behind."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class Outcome(enum.Enum):
    MADE = "made"
    KEPT = "kept"
    RENEWED = "renewed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What happened to one certificate."""

    name: str
    outcome: Outcome
    expires: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A CA certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_dev_pki(directory: Path, samplers: Sequence[str], hosts: Sequence[str], now: datetime) -> list[Made]:
    """A CA, and a certificate for learner, relay, monitor, admin and every sampler; the CA comes first in the answer.

    samplers: ids; each is also the file name. hosts: names or addresses of learner and relay besides localhost. `now`
    has a time zone. Raises StorageError; UsageError if a sampler has the name of another file.
    """
    fixed = (Role.LEARNER, Role.RELAY, Role.MONITOR, Role.ADMIN)
    taken = {"ca", *(role.value for role in fixed)}
    for name in samplers:
        if name in taken or name.endswith("-key"):
            raise UsageError(f"a sampler cannot be called {name!r}: another file has that name; choose another")
    identities = {role.value: Identity(role=role, id=role.value) for role in fixed}
    identities |= {name: Identity(role=Role.SAMPLER, id=name) for name in samplers}
    with storage_errors(f"make folder {directory}"):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, outcome = _open_authority(directory, now)
    made = [Made(name="ca", outcome=outcome, expires=authority.certificate.not_valid_after_utc)]
    all_hosts = list(dict.fromkeys([*LOCAL_HOSTS, *hosts]))
    return made + [_leaf(directory, name, identity, authority, all_hosts, now) for name, identity in identities.items()]


def issue(
    authority: Authority,
    identity: Identity,
    public_key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    start: datetime,
    end: datetime,
) -> x509.Certificate:
    """A leaf for `identity`. `hosts` become its DNS names and addresses if its role serves, and are left out if not."""
    serves, dials = identity.role in SERVING_ROLES, identity.role in DIALING_ROLES
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    names += [_host_name(host) for host in hosts] if serves else []
    usages = [ExtendedKeyUsageOID.SERVER_AUTH] * serves + [ExtendedKeyUsageOID.CLIENT_AUTH] * dials
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(f"{identity.role.value} {identity.id}"[:64]))
        .issuer_name(authority.certificate.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(authority_id, critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def make_authority(now: datetime) -> Authority:
    """A new CA that may sign leaves only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject("HeteroRL development CA")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate=certificate, key=key)


def write_pair(directory: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """NAME-key.pem (0600), then NAME.pem. Raises StorageError."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    atomic_write(directory / f"{name}-key.pem", pem, mode=0o600)
    atomic_write(directory / f"{name}.pem", certificate.public_bytes(Encoding.PEM))


def _open_authority(directory: Path, now: datetime) -> tuple[Authority, Outcome]:
    path, key_path = directory / "ca.pem", directory / "ca-key.pem"
    if not path.exists() and not key_path.exists():
        authority = make_authority(now)
        write_pair(directory, "ca", authority.certificate, authority.key)
        return authority, Outcome.MADE
    # A broken CA is not replaced: that would silently cut off every host that trusts it.
    certificate = parse_certificates(read_pem(path), path)[0]
    key = parse_key(read_pem(key_path), key_path)
    advice = "move the folder away to begin a new CA"
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_issued_by(certificate, certificate):
        raise ConfigError(f"{path} and {key_path} are not a CA of ours: {advice}")
    if public_bytes(key) != public_bytes(certificate):
        raise ConfigError(f"{key_path} does not belong to {path}: {advice}")
    require_in_time(certificate, path, now)
    return Authority(certificate=certificate, key=key), Outcome.KEPT


def _leaf(
    directory: Path, name: str, identity: Identity, authority: Authority, hosts: Sequence[str], now: datetime
) -> Made:
    files = TlsFiles.in_directory(directory, name)
    expires = _still_good(files, identity, hosts, now)
    if expires is not None:
        return Made(name=name, outcome=Outcome.KEPT, expires=expires)
    outcome = Outcome.RENEWED if files.certificate.exists() else Outcome.MADE
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(now + LEAF_LIFE, authority.certificate.not_valid_after_utc)
    names = list(dict.fromkeys([*hosts, *_hosts_before(files)]))
    write_pair(directory, name, issue(authority, identity, key.public_key(), names, now - _BACKDATE, end), key)
    return Made(name=name, outcome=outcome, expires=end)


def samplers_in(directory: Path) -> list[str]:
    """Ids of the samplers that have a certificate in this folder, expired ones too."""
    found = (path.stem for path in sorted(directory.glob("*.pem")))
    return [name for name in found if Identity(role=Role.SAMPLER, id=name).uri in _uris(directory / f"{name}.pem")]


def _uris(certificate: Path) -> list[str]:
    return [name.value for name in _names_before(certificate) if isinstance(name, x509.UniformResourceIdentifier)]


def _hosts_before(files: TlsFiles) -> list[str]:
    """Host names of the certificate that is there: a renewal that forgot one would cut off who dials it."""
    names = _names_before(files.certificate)
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def _names_before(certificate: Path) -> list[x509.GeneralName]:
    try:
        return list(alternative_names(parse_certificates(read_pem(certificate), certificate)[0]) or ())
    except HeteroRLError:
        return []


def _still_good(files: TlsFiles, identity: Identity, hosts: Sequence[str], now: datetime) -> datetime | None:
    """When the certificate on disk expires, if it is the one we would make and lives long enough."""
    try:
        own = (check_to_serve if identity.role in SERVING_ROLES else check_to_dial)(files, now)
        names = alternative_names(parse_certificates(own.certificate_pem, files.certificate)[0])
    except HeteroRLError:
        return None
    wanted = {_host_name(host) for host in hosts} if identity.role in SERVING_ROLES else set[x509.GeneralName]()
    if names is None or not wanted <= set(names) or own.identity != identity or own.expires - now < RENEW_BEFORE:
        return None
    return own.expires


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host.isascii() or not host or any(sign in host for sign in " /:@"):
        raise UsageError(f"{host!r} is not a host name or address: write it without scheme and port")
    return x509.DNSName(host)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )

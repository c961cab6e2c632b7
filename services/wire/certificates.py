"""Reading certificates, and checking our own before we dial or serve.

A server that refuses our certificate just closes the socket, and gRPC reports `UNAVAILABLE Socket closed` [M]. So each
process looks at its own files first, and says in one sentence what is wrong with them.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from services.runtime.errors import ConfigError, InputMissingError, RefusedError
from services.wire.identity import DIALING_ROLES, SERVING_ROLES, Identity, Role, parse_uri
from services.wire.tls import TlsFiles

SigningKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCertificate:
    """Checked credentials of this process."""

    identity: Identity
    expires: datetime
    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes


def check_to_dial(files: TlsFiles, now: datetime) -> OwnCertificate:
    """Our certificate as a client's. `now` has a time zone. Raises as `_check` does."""
    return _check(files, now, DIALING_ROLES, ExtendedKeyUsageOID.CLIENT_AUTH, "as a client")


def check_to_serve(files: TlsFiles, now: datetime) -> OwnCertificate:
    """Our certificate as a server's. `now` has a time zone. Raises as `_check` does."""
    return _check(files, now, SERVING_ROLES, ExtendedKeyUsageOID.SERVER_AUTH, "as a server")


def _check(
    files: TlsFiles, now: datetime, roles: frozenset[Role], usage: x509.ObjectIdentifier, how: str
) -> OwnCertificate:
    """Raises InputMissingError (no file), ConfigError (unreadable, not PEM, key of another certificate) or RefusedError
    (expired, not yet valid, signed by another CA, wrong usage or role).
    """
    ca_pem, certificate_pem, key_pem = (read_pem(path) for path in (files.ca, files.certificate, files.key))
    authorities = parse_certificates(ca_pem, files.ca)
    certificate = parse_certificates(certificate_pem, files.certificate)[0]
    key = parse_key(key_pem, files.key)
    if public_bytes(key) != public_bytes(certificate):
        raise ConfigError(
            f"key {files.key} does not belong to certificate {files.certificate}: set the pair made together"
        )
    require_in_time(certificate, files.certificate, now)
    issuer = next((authority for authority in authorities if is_issued_by(certificate, authority)), None)
    if issuer is None:
        raise RefusedError(
            f"certificate {files.certificate} was not signed by the authority in {files.ca}: set the CA of this run"
        )
    require_in_time(issuer, files.ca, now)
    identity = identity_of(certificate)
    if identity is None:
        raise RefusedError(f"certificate {files.certificate} names no HeteroRL identity: make one with `heterorl pki`")
    if identity.role not in roles:
        allowed = ", ".join(sorted(role.value for role in roles))
        raise RefusedError(f"certificate {files.certificate} is for {identity}, and only {allowed} may use one {how}")
    if usage not in _extended_usage(certificate):
        raise RefusedError(f"certificate {files.certificate} may not be used {how}: its extended key usage lacks it")
    return OwnCertificate(
        identity=identity,
        expires=certificate.not_valid_after_utc,
        ca_pem=ca_pem,
        certificate_pem=certificate_pem,
        key_pem=key_pem,
    )


def read_pem(path: Path) -> bytes:
    """A file's bytes. Raises InputMissingError or ConfigError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputMissingError(f"there is no file {path}: make certificates with `heterorl pki dev DIR`") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def parse_certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    """At least one certificate; `path` is for the message. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(f"{path} is not a PEM certificate") from None


def parse_key(pem: bytes, path: Path) -> SigningKey:
    """An unencrypted private key. Raises ConfigError."""
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigError(f"private key {path} has a password: store it without, readable by this user alone") from None
    except ValueError:
        raise ConfigError(f"{path} is not a PEM private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        raise ConfigError(f"private key {path} is of a kind that TLS does not use here: make an ECDSA key")
    return key


def require_in_time(certificate: x509.Certificate, path: Path, now: datetime) -> None:
    """Raises RefusedError for a certificate that is expired or not yet valid at `now`."""
    if now > certificate.not_valid_after_utc:
        raise RefusedError(
            f"certificate {path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: renew it"
        )
    if now < certificate.not_valid_before_utc:
        start = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise RefusedError(
            f"certificate {path} is valid from {start}, and it is {now:%Y-%m-%d %H:%M} here: check the clock"
        )


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority` signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def identity_of(certificate: x509.Certificate) -> Identity | None:
    """The one HeteroRL identity among the certificate's URIs."""
    names = alternative_names(certificate)
    uris = [] if names is None else names.get_values_for_type(x509.UniformResourceIdentifier)
    identities = [identity for uri in uris if (identity := parse_uri(uri)) is not None]
    return identities[0] if len(identities) == 1 else None


def alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _extended_usage(certificate: x509.Certificate) -> set[x509.ObjectIdentifier]:
    try:
        return set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, ValueError):
        return set()


def public_bytes(owner: SigningKey | x509.Certificate) -> bytes:
    """The public key of a key pair or certificate, to compare."""
    return owner.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

"""Ed25519 signatures of weight manifests, so that a relay needs no trust: it cannot make a version up.

The learner makes the key in its state folder and gives the public half to samplers at registration, over mutual TLS.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from services.runtime.errors import ConfigError, CorruptObjectError
from services.runtime.files import atomic_write, storage_errors

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


class ManifestSigner:
    """The private key. Its text form never leaves this class."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def load_or_create(cls, path: Path) -> "ManifestSigner":
        """The key in `path`, made there (mode 0600) if there is none. Raises StorageError or ConfigError."""
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            atomic_write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
            return cls(key)
        with storage_errors(f"read {path}"):
            pem = path.read_bytes()
        try:
            loaded = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError):
            raise ConfigError(
                f"{path} is not a PEM private key: restore it from a backup, or remove it to make a new one"
            ) from None
        if not isinstance(loaded, Ed25519PrivateKey):
            raise ConfigError(f"{path} is not an Ed25519 key: restore it from a backup, or remove it to make a new one")
        return cls(loaded)

    @property
    def public_key(self) -> bytes:
        """32 bytes, for `verify`."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(data)


def verify(public_key: bytes, data: bytes, signature: bytes) -> None:
    """Raises CorruptObjectError unless the holder of `public_key`'s other half signed `data`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise CorruptObjectError(
            "a manifest's signature is not the learner's: fetch it again from the learner"
        ) from None

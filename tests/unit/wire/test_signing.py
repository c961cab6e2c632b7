"""Manifest signatures."""

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from services.runtime.errors import ConfigError, CorruptObjectError, StorageError
from services.wire.signing import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, ManifestSigner, verify


def test_a_signature_is_verified_by_the_public_half(tmp_path: Path):
    signer = ManifestSigner.load_or_create(tmp_path / "key.pem")
    signature = signer.sign(b"manifest")
    assert (len(signer.public_key), len(signature)) == (PUBLIC_KEY_BYTES, SIGNATURE_BYTES)
    verify(signer.public_key, b"manifest", signature)


def test_the_key_is_private_and_survives_a_restart(tmp_path: Path):
    path = tmp_path / "key.pem"
    first = ManifestSigner.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ManifestSigner.load_or_create(path).public_key == first.public_key


def test_anything_changed_is_refused(tmp_path: Path):
    signer = ManifestSigner.load_or_create(tmp_path / "key.pem")
    signature = signer.sign(b"manifest")
    other = ManifestSigner.load_or_create(tmp_path / "other.pem").public_key
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    for key, data, sign in [
        (signer.public_key, b"manifesT", signature),
        (signer.public_key, b"manifest", flipped),
        (signer.public_key, b"manifest", b""),
        (other, b"manifest", signature),
        (b"short", b"manifest", signature),
    ]:
        with pytest.raises(CorruptObjectError, match="signature is not the learner's"):
            verify(key, data, sign)


def test_a_key_file_that_is_something_else_is_never_overwritten(tmp_path: Path):
    ecdsa = ec.generate_private_key(ec.SECP256R1())
    for content in (b"", b"x", ecdsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())):
        (tmp_path / "key.pem").write_bytes(content)
        with pytest.raises(ConfigError, match=r"key\.pem is not"):
            ManifestSigner.load_or_create(tmp_path / "key.pem")
        assert (tmp_path / "key.pem").read_bytes() == content
    os.mkdir(tmp_path / "folder")
    with pytest.raises(StorageError):
        ManifestSigner.load_or_create(tmp_path / "folder")

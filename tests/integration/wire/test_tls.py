"""Mutual TLS between real servers and clients, with the certificates that `heterorl pki` makes."""

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from services.runtime.errors import RefusedError, UnavailableError
from services.wire.channel import open_channel
from services.wire.credentials import channel_credentials, server_credentials
from services.wire.errors import from_rpc_error
from services.wire.identity import Identity, Role
from services.wire.interceptors import require_peer_id
from services.wire.pki import issue, make_authority, make_dev_pki, write_pair
from services.wire.tls import TlsFiles
from tests.integration.wire.echo_service import UNARY, WHO, Address, Echo, serving

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    make_dev_pki(tmp_path / "pki", ["sampler-1", "sampler-2"], [], NOW)
    return tmp_path / "pki"


def server_side(directory: Path) -> grpc.ServerCredentials:
    return server_credentials(TlsFiles.in_directory(directory, "learner"))[0]


def client_side(directory: Path, name: str) -> grpc.ChannelCredentials:
    return channel_credentials(TlsFiles.in_directory(directory, name))[0]


def unchecked(directory: Path, name: str, ca: Path | None = None) -> grpc.ChannelCredentials:
    """Credentials as a client without our preflight has them."""
    files = TlsFiles.in_directory(directory, name)
    return grpc.ssl_channel_credentials(
        (ca or files.ca).read_bytes(), files.key.read_bytes(), files.certificate.read_bytes()
    )


async def call(address: Address, credentials: grpc.ChannelCredentials, method: str = WHO, timeout: float = 20) -> bytes:
    async with open_channel(address, credentials, "control") as channel:
        try:
            return await channel.unary_unary(method)(b"x", timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


async def refused_by_the_handshake(address: Address, credentials: grpc.ChannelCredentials) -> str:
    """What a client that does not wait for readiness is told. The call never reaches a handler."""
    async with grpc.aio.secure_channel(str(address), credentials) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(WHO)(b"x", timeout=20, wait_for_ready=False)
    assert isinstance(from_rpc_error(caught.value), UnavailableError)
    return caught.value.details() or ""


async def test_each_certificate_of_the_folder_is_known_by_its_identity(pki: Path):
    async with serving(Echo(), server_side(pki)) as address:
        for name, identity in {
            "sampler-1": b"sampler sampler-1",
            "monitor": b"monitor monitor",
            "admin": b"admin admin",
            "relay": b"relay relay",
        }.items():
            assert await call(address, client_side(pki, name)) == identity


async def test_a_sampler_may_call_its_method_and_a_monitor_gets_permission_denied(pki: Path):
    async with serving(Echo(), server_side(pki)) as address:
        assert await call(address, client_side(pki, "sampler-1"), UNARY) == b"x"
        with pytest.raises(RefusedError, match=f"monitor monitor may not call {UNARY}"):
            await call(address, client_side(pki, "monitor"), UNARY)


async def test_with_tls_nobody_is_who_its_user_agent_says(pki: Path):
    options = [("grpc.primary_user_agent", Identity(role=Role.ADMIN, id="root").uri)]
    async with (
        serving(Echo(), server_side(pki)) as address,
        grpc.aio.secure_channel(str(address), client_side(pki, "monitor"), options=options) as channel,
    ):
        assert await channel.unary_unary(WHO)(b"x", timeout=20) == b"monitor monitor"


async def test_an_id_that_is_not_the_certificates_is_refused(pki: Path):
    class Claims(Echo):
        async def who(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return str(require_peer_id(context, "sampler-2")).encode()

    async with serving(Claims(), server_side(pki)) as address:
        assert await call(address, client_side(pki, "sampler-2")) == b"sampler sampler-2"
        with pytest.raises(RefusedError, match=r"is for sampler sampler-1, and the message says .* 'sampler-2'"):
            await call(address, client_side(pki, "sampler-1"))


async def test_a_client_of_another_ca_does_not_get_through_the_handshake(pki: Path, tmp_path: Path):
    make_dev_pki(tmp_path / "other", ["sampler-1"], [], NOW)
    stranger = unchecked(tmp_path / "other", "sampler-1", ca=pki / "ca.pem")
    async with serving(Echo(), server_side(pki)) as address:
        await refused_by_the_handshake(address, stranger)


async def test_a_client_without_a_certificate_does_not_get_through_the_handshake(pki: Path):
    async with serving(Echo(), server_side(pki)) as address:
        await refused_by_the_handshake(address, grpc.ssl_channel_credentials((pki / "ca.pem").read_bytes()))


def signed_anew(directory: Path, names: Sequence[Identity], start: datetime, end: datetime) -> None:
    """A folder whose CA signs leaves with the validity that a test needs."""
    directory.mkdir()
    authority = make_authority(min(start, NOW))
    write_pair(directory, "ca", authority.certificate, authority.key)
    for identity in names:
        key = ec.generate_private_key(ec.SECP256R1())
        first, last = (start, end) if identity.role is Role.SAMPLER else (NOW - DAY, NOW + DAY)
        leaf = issue(authority, identity, key.public_key(), ["127.0.0.1"], first, last)
        write_pair(directory, identity.id, leaf, key)


@pytest.mark.parametrize(("start", "end"), [(-10, -1), (1, 10)], ids=["expired", "not yet valid"])
async def test_a_client_certificate_out_of_its_time_is_refused_by_the_server_and_by_our_own_check(
    tmp_path: Path, start: int, end: int
):
    names = [Identity(role=Role.LEARNER, id="learner"), Identity(role=Role.SAMPLER, id="s")]
    signed_anew(tmp_path / "pki", names, NOW + start * DAY, NOW + end * DAY)
    with pytest.raises(RefusedError, match="expired on" if end < 0 else "check the clock"):
        client_side(tmp_path / "pki", "s")
    async with serving(Echo(), server_side(tmp_path / "pki")) as address:
        await refused_by_the_handshake(address, unchecked(tmp_path / "pki", "s"))


async def test_a_samplers_certificate_cannot_pose_as_the_learner(pki: Path):
    files = TlsFiles.in_directory(pki, "sampler-1")
    pair = (files.key.read_bytes(), files.certificate.read_bytes())
    imposter = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
    async with serving(Echo(), imposter) as address:
        assert "CERTIFICATE_VERIFY_FAILED" in await refused_by_the_handshake(address, client_side(pki, "sampler-2"))


async def test_a_learners_certificate_without_this_host_is_not_believed(tmp_path: Path):
    directory = tmp_path / "pki"
    make_dev_pki(directory, ["sampler-1"], [], NOW)
    authority = make_authority(NOW)
    write_pair(directory, "ca", authority.certificate, authority.key)
    for identity in (Identity(role=Role.LEARNER, id="learner"), Identity(role=Role.SAMPLER, id="sampler-1")):
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = issue(authority, identity, key.public_key(), ["elsewhere.example"], NOW - DAY, NOW + DAY)
        write_pair(directory, identity.id, leaf, key)
    async with serving(Echo(), server_side(directory)) as address:
        await refused_by_the_handshake(address, client_side(directory, "sampler-1"))


async def test_the_server_takes_new_certificates_without_a_restart_and_keeps_open_connections(
    pki: Path, tmp_path: Path
):
    async with (
        serving(Echo(), server_side(pki)) as address,
        open_channel(address, client_side(pki, "sampler-1"), "control") as old,
    ):
        assert await old.unary_unary(UNARY)(b"1", timeout=20) == b"1"
        make_dev_pki(tmp_path / "new", ["sampler-1"], [], NOW)
        for name in ("ca.pem", "learner-key.pem", "learner.pem"):
            os.replace(tmp_path / "new" / name, pki / name)
        (tmp_path / "new" / "ca.pem").write_bytes((pki / "ca.pem").read_bytes())
        assert await call(address, client_side(tmp_path / "new", "sampler-1"), UNARY) == b"x"
        assert await old.unary_unary(UNARY)(b"2", timeout=20) == b"2"


async def test_grpc_is_given_a_certificate_once_and_not_at_each_handshake(
    pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It frees the TLS context of the one before while another handshake uses it, and the process crashes."""
    answers: list[grpc.ServerCertificateConfiguration | None] = []
    make = grpc.dynamic_ssl_server_credentials

    def recorded(initial: Any, fetch: Callable[[], Any], require: bool) -> grpc.ServerCredentials:
        return make(initial, lambda: (answers.append(fetch()), answers[-1])[1], require)

    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", recorded)
    async with serving(Echo(), server_side(pki)) as address:
        for _ in range(3):
            assert await call(address, client_side(pki, "sampler-1"), UNARY) == b"x"
        assert answers == [None] * 3
        make_dev_pki(tmp_path / "new", ["sampler-1"], [], NOW)
        for name in ("ca.pem", "learner-key.pem", "learner.pem", "sampler-1.pem", "sampler-1-key.pem"):
            os.replace(tmp_path / "new" / name, pki / name)
        for _ in range(2):
            assert await call(address, client_side(pki, "sampler-1"), UNARY) == b"x"
        assert [answer is not None for answer in answers[3:]] == [True, False]


@pytest.mark.parametrize("damage", ["key of another pair", "garbage", "absent"])
async def test_a_half_done_or_broken_rotation_leaves_the_old_certificate_in_use(
    pki: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    async with serving(Echo(), server_side(pki)) as address:
        make_dev_pki(tmp_path / "new", ["sampler-1"], [], NOW)
        client = client_side(pki, "sampler-1")
        if damage == "garbage":
            (pki / "learner.pem").write_bytes(b"\x00" * 100)
        elif damage == "absent":
            (pki / "learner.pem").unlink()
        else:
            os.replace(tmp_path / "new" / "learner-key.pem", pki / "learner-key.pem")
        with caplog.at_level("WARNING", "heterorl"):
            for _ in range(2):
                assert await call(address, client, UNARY) == b"x"
    assert caplog.text.count("certificate_not_rotated") == 1, "once for one fault, not once for each handshake"

"""The settings of channels and servers that must agree with each other."""

import pytest

from services.runtime.address import Address
from services.wire.channel import MESSAGE_BYTES, channel_options, proxy_to, route_to
from services.wire.identity import Identity, Role
from services.wire.server import server_options


@pytest.mark.parametrize("role", ["learner", "relay", "reward"])
def test_clients_ping_less_often_than_servers_allow(role):
    """Else a connection that is idle, or has one long call, ends after four pings: too_many_pings."""
    table = dict(server_options(role))
    allowed_ms = table["grpc.http2.min_ping_interval_without_data_ms"]
    sent_ms = dict(channel_options("control"))["grpc.keepalive_time_ms"]
    assert isinstance(sent_ms, int)
    assert isinstance(allowed_ms, int)
    assert sent_ms >= 2 * allowed_ms
    assert table["grpc.keepalive_permit_without_calls"] == 1


def test_a_keepalive_that_goes_unanswered_is_noticed_on_both_sides():
    for options in (channel_options("bulk"), server_options("learner"), server_options("relay")):
        table = dict(options)
        assert table["grpc.http2.ping_timeout_ms"] == table["grpc.keepalive_timeout_ms"]


@pytest.mark.parametrize("role", ["learner", "relay", "reward"])
def test_no_server_shares_its_port_or_takes_compressed_or_large_messages(role):
    table = dict(server_options(role))
    assert table["grpc.so_reuseport"] == 0
    assert table["grpc.compression_enabled_algorithms_bitset"] == 1
    assert table["grpc.max_receive_message_length"] == MESSAGE_BYTES


def test_a_channel_names_its_identity_and_has_connections_of_its_own():
    table = dict(channel_options("control", Identity(role=Role.SAMPLER, id="eu-2")))
    assert table["grpc.primary_user_agent"] == "spiffe://heterorl/sampler/eu-2"
    assert table["grpc.use_local_subchannel_pool"] == 1


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_proxy_of_the_environment_is_named_without_its_password(environment: pytest.MonkeyPatch):
    learner = Address(host="learner.example.org", port=7443)
    assert route_to(learner) == "learner.example.org:7443"
    environment.setenv("http_proxy", "http://ann:secret@10.0.0.9:3128")
    assert route_to(learner) == "learner.example.org:7443 (through the proxy of http_proxy=http://10.0.0.9:3128)"
    assert route_to(Address(host="127.0.0.1", port=7443)) == "127.0.0.1:7443"
    environment.setenv("https_proxy", "http://proxy:80")
    assert proxy_to("learner.example.org") == "https_proxy=http://proxy:80", "as gRPC chooses"


@pytest.mark.parametrize("proxy", ["", "socks5://10.0.0.9:1080", "10.0.0.9:3128", "http://", "http://[::1"])
def test_a_proxy_that_grpc_cannot_use_is_none(environment: pytest.MonkeyPatch, proxy: str):
    environment.setenv("https_proxy", proxy)
    environment.setenv("http_proxy", "http://10.0.0.9:3128")
    assert proxy_to("learner.example.org") == ""


@pytest.mark.parametrize(
    ("spared", "host", "direct"),
    [
        ("*", "learner.example.org", True),
        ("other.org, .example.org", "Learner.Example.org", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("fd00::/8", "fd09:1::2", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("example.com,", "learner.example.org", False),
    ],
)
def test_no_proxy_spares_all_suffixes_and_networks(
    environment: pytest.MonkeyPatch, spared: str, host: str, direct: bool
):
    environment.setenv("https_proxy", "http://10.0.0.9:3128")
    environment.setenv("no_proxy", spared)
    assert (proxy_to(host) == "") is direct

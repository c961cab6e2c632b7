"""The settings of channels and servers that must agree with each other."""

import pytest

from services.wire.channel import MESSAGE_BYTES, channel_options
from services.wire.identity import Identity, Role
from services.wire.server import server_options


def test_clients_ping_less_often_than_the_learner_allows():
    allowed_ms = dict(server_options("learner"))["grpc.http2.min_ping_interval_without_data_ms"]
    sent_ms = dict(channel_options("control"))["grpc.keepalive_time_ms"]
    assert isinstance(sent_ms, int)
    assert isinstance(allowed_ms, int)
    assert sent_ms >= 2 * allowed_ms


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

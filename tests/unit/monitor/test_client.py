import grpc
from grpc.aio import Metadata

from services.monitor.client import unanswered
from services.runtime.errors import HeteroRLError, MismatchError, RefusedError, UnavailableError


def said(code: grpc.StatusCode, details: str) -> HeteroRLError:
    return unanswered("site:7444", grpc.aio.AioRpcError(code, Metadata(), Metadata(), details))


def test_a_relays_port_is_told_from_a_learners():
    error = said(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert isinstance(error, MismatchError)
    assert "site:7444" in str(error)
    assert "relay" in str(error)


def test_silence_names_who_is_silent_and_grpcs_reason():
    error = said(grpc.StatusCode.UNAVAILABLE, "Connection refused")
    assert isinstance(error, UnavailableError)
    assert str(error).startswith("site:7444 does not answer")
    assert "(Connection refused)" in str(error)
    assert "Deadline" not in str(said(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))


def test_a_socket_that_nobody_serves_is_named():
    silent = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), "No such file or directory")
    error = unanswered("unix:///run/reward.sock", silent)
    assert isinstance(error, UnavailableError)
    assert str(error).startswith("unix:///run/reward.sock does not answer")


def test_a_refusal_is_told_in_the_learners_words():
    error = said(grpc.StatusCode.PERMISSION_DENIED, "sampler eu-1 may not call it")
    assert isinstance(error, RefusedError)
    assert "sampler eu-1 may not call it" in str(error)

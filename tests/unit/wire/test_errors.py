"""The table between our exceptions and gRPC statuses, both ways."""

import grpc
import pytest
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from services.runtime import errors
from services.runtime.errors import (
    BadInputError,
    ConfigError,
    CorruptObjectError,
    ExhaustedError,
    FencedError,
    HeteroRLError,
    MismatchError,
    ObjectGoneError,
    RefusedError,
    StorageError,
    UnavailableError,
)
from services.wire.errors import code_of, from_rpc_error, to_status

KEY = "grpc-status-details-bin"
EVERY_CLASS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HeteroRLError)]


def received(status: Status) -> grpc.aio.AioRpcError:
    """The exception that a client gets for a status that a server ended a call with."""
    sent = rpc_status.to_status(status)
    return bare(sent.code, sent.details, *sent.trailing_metadata)


def bare(code: grpc.StatusCode, details: str, *metadata: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=details)


@pytest.mark.parametrize("kind", EVERY_CLASS, ids=lambda kind: kind.__name__)
def test_every_class_arrives_as_itself_with_its_message(kind: type[HeteroRLError]):
    error = from_rpc_error(received(to_status(kind("group 7 is unknown: ask again — später"))))
    assert type(error) is kind
    assert str(error) == "group 7 is unknown: ask again — später"


def test_a_subclass_outside_the_table_arrives_as_its_nearest_base():
    class TooDeepError(CorruptObjectError):
        pass

    assert code_of(TooDeepError("x")) is grpc.StatusCode.DATA_LOSS
    assert type(from_rpc_error(received(to_status(TooDeepError("x"))))) is CorruptObjectError


def test_the_proposed_wait_travels():
    error = from_rpc_error(received(to_status(ExhaustedError("full", retry_after_s=12.25))))
    assert isinstance(error, ExhaustedError)
    assert error.retry_after_s == 12.25


def test_a_full_disk_proposes_a_wait_too():
    assert len(to_status(StorageError("disk full")).details) == 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError),
        (grpc.StatusCode.CANCELLED, UnavailableError),
        (grpc.StatusCode.INTERNAL, UnavailableError),
        (grpc.StatusCode.UNKNOWN, UnavailableError),
        (grpc.StatusCode.INVALID_ARGUMENT, BadInputError),
        (grpc.StatusCode.OUT_OF_RANGE, BadInputError),
        (grpc.StatusCode.NOT_FOUND, ObjectGoneError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ExhaustedError),
        (grpc.StatusCode.ABORTED, FencedError),
        (grpc.StatusCode.FAILED_PRECONDITION, ConfigError),
        (grpc.StatusCode.UNIMPLEMENTED, MismatchError),
        (grpc.StatusCode.DATA_LOSS, CorruptObjectError),
        (grpc.StatusCode.UNAUTHENTICATED, RefusedError),
        (grpc.StatusCode.PERMISSION_DENIED, RefusedError),
    ],
)
def test_a_status_of_a_stranger_is_read_by_its_code(code: grpc.StatusCode, kind: type[HeteroRLError]):
    error = from_rpc_error(bare(code, "Socket closed"))
    assert type(error) is kind
    assert str(error) == f"the peer answered {code.name}: Socket closed"


@pytest.mark.parametrize("size", ["Received message larger than max (5 vs. 4)", "metadata size exceeds hard limit"])
def test_what_is_too_large_now_is_too_large_later(size: str):
    assert type(from_rpc_error(bare(grpc.StatusCode.RESOURCE_EXHAUSTED, size))) is BadInputError


def test_every_code_has_an_error():
    for code in grpc.StatusCode:
        assert isinstance(from_rpc_error(bare(code, "")), HeteroRLError)


@pytest.mark.parametrize("forged", [b"", b"\xff\xff", b"\x08\x0d\x1a\x02\xff\xff", b"\x1a\x80\x80\x80\x80\x08"])
def test_details_that_are_garbage_do_not_get_in_the_way(forged: bytes):
    error = from_rpc_error(bare(grpc.StatusCode.UNAVAILABLE, "gone", (KEY, forged)))
    assert type(error) is UnavailableError


def test_details_for_another_code_are_not_believed():
    fenced = rpc_status.to_status(to_status(FencedError("end yourself")))
    error = from_rpc_error(bare(grpc.StatusCode.UNAVAILABLE, "gone", *fenced.trailing_metadata))
    assert type(error) is UnavailableError


def test_a_reason_of_a_newer_version_falls_back_to_the_code():
    status = to_status(FencedError("x"))
    status.details[0].value = status.details[0].value.replace(b"SESSION_FENCED", b"SESSION_FUTURE")
    assert type(from_rpc_error(received(status))) is FencedError


def test_a_long_message_is_cut_so_that_it_fits_the_metadata():
    status = to_status(BadInputError("ü" * 10_000))
    assert len(status.SerializeToString()) * 4 / 3 + 3 * len(status.message.encode()) < 8192

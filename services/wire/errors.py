"""Our exception tree as gRPC statuses, and back: the one table between them.

A status carries google.rpc.ErrorInfo, whose reason names the class, so that the other end raises what this end raised.
A status without it comes from gRPC itself or from a stranger; its code alone decides.
"""

from collections.abc import Iterable, Sequence
from typing import NoReturn, Protocol, TypeAlias, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from services.runtime import errors
from services.runtime.errors import ExhaustedError, HeteroRLError

DOMAIN = "heterorl"
_DETAILS_KEY = "grpc-status-details-bin"
_MOST_BYTES = 1000
"""A message stands twice in the trailing metadata, percent-encoded and in base64, and the metadata may take 8 KiB."""

_Code: TypeAlias = grpc.StatusCode
_TABLE: tuple[tuple[type[HeteroRLError], grpc.StatusCode, str], ...] = (
    (errors.HeteroRLError, _Code.INTERNAL, "INTERNAL"),
    (errors.UsageError, _Code.INVALID_ARGUMENT, "USAGE"),
    (errors.BadInputError, _Code.INVALID_ARGUMENT, "BAD_INPUT"),
    (errors.ScoreError, _Code.INVALID_ARGUMENT, "UNGRADABLE"),
    (errors.InvalidWeightsError, _Code.INVALID_ARGUMENT, "INVALID_WEIGHTS"),
    (errors.CorruptObjectError, _Code.DATA_LOSS, "CORRUPT_OBJECT"),
    (errors.InputMissingError, _Code.NOT_FOUND, "MISSING"),
    (errors.ObjectGoneError, _Code.NOT_FOUND, "OBJECT_GONE"),
    (errors.UnavailableError, _Code.UNAVAILABLE, "UNAVAILABLE"),
    (errors.EngineError, _Code.INTERNAL, "ENGINE"),
    (errors.StorageError, _Code.RESOURCE_EXHAUSTED, "STORAGE"),
    (errors.DiskFullError, _Code.RESOURCE_EXHAUSTED, "DISK_FULL"),
    (errors.ExhaustedError, _Code.RESOURCE_EXHAUSTED, "EXHAUSTED"),
    (errors.SessionLostError, _Code.ABORTED, "LEARNER_RESTARTED"),
    (errors.FencedError, _Code.ABORTED, "SESSION_FENCED"),
    (errors.RefusedError, _Code.PERMISSION_DENIED, "REFUSED"),
    (errors.ConfigError, _Code.FAILED_PRECONDITION, "CONFIG"),
    (errors.MismatchError, _Code.FAILED_PRECONDITION, "MISMATCH"),
)
_BY_CLASS = {row[0]: row for row in _TABLE}
_BY_REASON = {row[2]: row[0] for row in _TABLE}

# Without our ErrorInfo. INTERNAL and UNKNOWN then come from the transport (a reset stream), since our servers always
# say who they are: a new connection heals them.
_BY_CODE: dict[grpc.StatusCode, type[HeteroRLError]] = {
    _Code.CANCELLED: errors.UnavailableError,
    _Code.UNKNOWN: errors.UnavailableError,
    _Code.DEADLINE_EXCEEDED: errors.UnavailableError,
    _Code.UNAVAILABLE: errors.UnavailableError,
    _Code.INTERNAL: errors.UnavailableError,
    _Code.INVALID_ARGUMENT: errors.BadInputError,
    _Code.OUT_OF_RANGE: errors.BadInputError,
    _Code.ALREADY_EXISTS: errors.BadInputError,
    _Code.NOT_FOUND: errors.ObjectGoneError,
    _Code.RESOURCE_EXHAUSTED: errors.ExhaustedError,
    _Code.ABORTED: errors.FencedError,
    _Code.FAILED_PRECONDITION: errors.ConfigError,
    _Code.UNIMPLEMENTED: errors.MismatchError,
    _Code.DATA_LOSS: errors.CorruptObjectError,
    _Code.UNAUTHENTICATED: errors.RefusedError,
    _Code.PERMISSION_DENIED: errors.RefusedError,
}
_STORAGE_RETRY_S = 30.0
"""A full disk is not free again in a second."""
_AWAY_RETRY_S = 1.0
"""What is away for us, a relay's learner say, may be back at any moment."""


def code_of(error: HeteroRLError) -> grpc.StatusCode:
    """The gRPC code of an error of ours; a class outside the table has that of its nearest base."""
    return _row_of(error)[1]


def to_status(error: HeteroRLError) -> Status:
    """google.rpc.Status with ErrorInfo, and RetryInfo where a later attempt can succeed."""
    _, code, reason = _row_of(error)
    number = cast(int, code.value[0])
    status = Status(code=number, message=_bounded(str(error)))
    _attach(status, ErrorInfo(reason=reason, domain=DOMAIN))
    retry_after_s = _retry_after_s(error)
    if retry_after_s is not None:
        retry = RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after_s * 1e9))
        _attach(status, retry)
    return status


class Abortable(Protocol):
    """The part of a servicer's context that ends a call."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str | bytes]] = ()
    ) -> NoReturn: ...


async def abort(context: Abortable, error: HeteroRLError) -> NoReturn:
    """Ends the call with the error's status. Raises, as `context.abort` does."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, tuple(status.trailing_metadata))


def from_rpc_error(error: grpc.aio.AioRpcError) -> HeteroRLError:
    """What the other end raised, or the nearest error for a status that is not ours. The caller raises it."""
    code, details = error.code(), error.details() or ""
    status = _carried_status(cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()))
    if status is not None and status.code == code.value[0]:
        reason, retry_after_s = _read_details(status)
        if reason is not None:
            found = _BY_REASON.get(reason) or _BY_CODE.get(code, HeteroRLError)
            return _build(found, details or reason, retry_after_s)
    if code is _Code.RESOURCE_EXHAUSTED and ("larger than max" in details or "metadata size exceeds" in details):
        return errors.BadInputError(f"a message is larger than the peer accepts: {_bounded(details)}")
    found = _BY_CODE.get(code, HeteroRLError)
    return _build(found, f"the peer answered {code.name}: {_bounded(details) or 'no reason given'}", None)


def peer_error(error: grpc.aio.AioRpcError) -> HeteroRLError:
    """As `from_rpc_error`, for a client that waits: a peer whose disk is full, or that has a fault of its own, is away
    like one that restarts, so that its faults end nobody else."""
    found = from_rpc_error(error)
    if type(found) is HeteroRLError or isinstance(found, errors.StorageError):
        return errors.UnavailableError(f"the peer has a fault: {found}")
    return found


def no_learner(target: str) -> HeteroRLError:
    """For UNIMPLEMENTED of a call that every learner knows."""
    return errors.MismatchError(
        f"{target} answers, and is no learner of this version: is it a relay or an older learner?"
    )


def _row_of(error: HeteroRLError) -> tuple[type[HeteroRLError], grpc.StatusCode, str]:
    return next(_BY_CLASS[base] for base in type(error).__mro__ if base in _BY_CLASS)


def _retry_after_s(error: HeteroRLError) -> float | None:
    if isinstance(error, ExhaustedError):
        return max(0.0, error.retry_after_s)
    if isinstance(error, errors.StorageError):
        return _STORAGE_RETRY_S
    return _AWAY_RETRY_S if isinstance(error, errors.UnavailableError) else None


def _build(found: type[HeteroRLError], message: str, retry_after_s: float | None) -> HeteroRLError:
    if issubclass(found, ExhaustedError):
        return found(message) if retry_after_s is None else found(message, retry_after_s)
    return found(message)


def _attach(status: Status, detail: ErrorInfo | RetryInfo) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)


def _carried_status(metadata: Iterable[tuple[str, str | bytes]]) -> Status | None:
    """`rpc_status.from_call` raises on what a hostile peer can send; this answers None."""
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return Status.FromString(value)
            except DecodeError:
                return None
    return None


def _read_details(status: Status) -> tuple[str | None, float | None]:
    """(reason, retry_after_s) of a status that says it is ours."""
    reason: str | None = None
    retry_after_s: float | None = None
    for packed in status.details:
        info, retry = ErrorInfo(), RetryInfo()
        try:
            if packed.Unpack(info) and info.domain == DOMAIN:
                reason = info.reason
            elif packed.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:
            return None, None
    return reason, retry_after_s


def _bounded(text: str) -> str:
    raw = text.encode()
    return text if len(raw) <= _MOST_BYTES else raw[:_MOST_BYTES].decode(errors="ignore") + "…"

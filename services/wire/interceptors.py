"""What every call to our servers passes, outermost first.

Errors ──► Access ──► handler
  │          └ the peer's role must be in the method's list; a method without a list is refused to everyone; a peer has
  │            so many calls open at most
  └ HeteroRLError ► its status · anything else ► INTERNAL and an id; the text stays in the log, under that id
"""

from __future__ import annotations  # gRPC types take parameters in their stubs only

import abc
import asyncio
import contextlib
import inspect
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError

from services.runtime.errors import BadInputError, ExhaustedError, RefusedError
from services.runtime.lifecycle import explain
from services.runtime.log import get_logger
from services.wire.errors import abort
from services.wire.identity import Identity, Role, parse_uri

Context: TypeAlias = grpc.aio.ServicerContext[object, object]
Handler: TypeAlias = "grpc.RpcMethodHandler[object, object]"
Continuation: TypeAlias = (
    "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[_RequestT, _ResponseT] | None]]"
)
Coroutine: TypeAlias = Callable[[object, Context], Awaitable[object]]
Generator: TypeAlias = Callable[[object, Context], AsyncGenerator[object]]
Deserializer: TypeAlias = Callable[[bytes], object]
Guard: TypeAlias = Callable[[Context], AbstractAsyncContextManager[None]]
AccessRules: TypeAlias = Mapping[str, frozenset[Role]]
"""Full method name ("/heterorl.v1.ControlService/Register") -> the roles that may call it."""

HEALTH_RULES: AccessRules = {
    "/grpc.health.v1.Health/Check": frozenset(Role),
    "/grpc.health.v1.Health/Watch": frozenset(Role),
}
"""The health service, for everyone with a certificate."""

MOST_CALLS = 320
"""Calls that one identity may have open. A sampler with all its 16 channels full has 16 calls on each, and some on its
control channel; each that is not read holds up to 2 MiB here."""

_GOING_S = 1.0
"""A write to a peer that goes fails a moment before gRPC knows that it has gone, and cancels the call."""

_MAKERS = {  # (requests stream, responses stream)
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")
_LOCAL = Identity(role=Role.MONITOR, id="local")
_TRANSPORT = "transport_security_type"
_WITHOUT_TLS = ([], [b"insecure"], [b"local"])
_ALTERNATIVE_NAMES = "x509_subject_alternative_name"

_log = get_logger("wire.server")


class CallFacts(Protocol):
    """The part of a servicer's context that says who calls."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]: ...

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def peer_identity(context: CallFacts) -> Identity:
    """Who calls. Raises RefusedError for a certificate that names none of our roles.

    With TLS: the certificate's SPIFFE URI. Without it (`bind` allows that on loopback and Unix sockets only): what
    the client says, in its user agent (`open_channel(identity=…)`), and a monitor if it says nothing.
    """
    facts = context.auth_context()
    if list(facts.get(_TRANSPORT, [])) in _WITHOUT_TLS:
        agent = next((value for key, value in context.invocation_metadata() or () if key == "user-agent"), "")
        return parse_uri(str(agent).split(" ")[0]) or _LOCAL
    names = [name.decode(errors="replace") for name in facts.get(_ALTERNATIVE_NAMES, [])]
    identities = [identity for name in names if (identity := parse_uri(name)) is not None]
    if len(identities) != 1:
        raise RefusedError("the client certificate does not name exactly one HeteroRL identity")
    return identities[0]


def require_peer_id(context: CallFacts, claimed: str) -> Identity:
    """The caller's identity, if its id is the one that a message claims. Raises RefusedError."""
    identity = peer_identity(context)
    if identity.id != claimed:
        raise RefusedError(f"the certificate is for {identity}, and the message says it is from {claimed[:80]!r}")
    return identity


class _Guarding(grpc.aio.ServerInterceptor):
    """Runs every handler, whatever its kind, inside `self.guard(context, method)`."""

    async def intercept_service(
        self,
        continuation: Continuation[_RequestT, _ResponseT],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[_RequestT, _ResponseT] | None:
        method = handler_call_details.method
        handler = cast("Handler | None", await continuation(handler_call_details))
        guarded = _guarded(handler, lambda context: self.guard(context, method))
        return cast("grpc.RpcMethodHandler[_RequestT, _ResponseT] | None", guarded)

    @abc.abstractmethod
    def guard(self, context: Context, method: str) -> AbstractAsyncContextManager[None]: ...


class ErrorInterceptor(_Guarding):
    """Outermost: nothing but statuses of ours leaves this process."""

    def guard(self, context: Context, method: str) -> AbstractAsyncContextManager[None]:
        return _mapped(context, method)


class AccessInterceptor(_Guarding):
    """Role × method allow-list with default deny, checked at every call: connections outlive decisions."""

    def __init__(self, rules: AccessRules, is_denied: Callable[[Identity], bool] = lambda _: False) -> None:
        self._rules = rules
        self._is_denied = is_denied
        self._open = Counter[Identity]()

    def guard(self, context: Context, method: str) -> AbstractAsyncContextManager[None]:
        return self._admitted(context, method)

    @contextlib.asynccontextmanager
    async def _admitted(self, context: Context, method: str) -> AsyncGenerator[None]:
        identity = peer_identity(context)
        if identity.role not in self._rules.get(method, frozenset()):
            raise RefusedError(f"{identity} may not call {method}")
        if self._is_denied(identity):
            raise RefusedError(f"{identity} is on the deny-list: ask the operator of this learner")
        if self._open[identity] >= MOST_CALLS:
            raise ExhaustedError(f"{identity} has {MOST_CALLS} calls open: end some of them")
        self._open[identity] += 1
        try:
            yield
        finally:
            self._open[identity] -= 1
            if not self._open[identity]:
                del self._open[identity]


def server_interceptors(
    rules: AccessRules, is_denied: Callable[[Identity], bool] = lambda _: False
) -> list[grpc.aio.ServerInterceptor]:
    """What `build_server` takes, in order."""
    return [ErrorInterceptor(), AccessInterceptor(rules, is_denied)]


@contextlib.asynccontextmanager
async def _mapped(context: Context, method: str) -> AsyncGenerator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as error:  # the end of a call: nothing above could do better
        if isinstance(error, grpc.aio.InternalError):
            await asyncio.sleep(_GOING_S)
        if context.done():
            _log.info("call_left", method=method, peer=context.peer(), reason=type(error).__name__)
            raise grpc.aio.AbortError from error
        failure = explain(error, _log.bind(method=method, peer=context.peer()))
        if isinstance(failure, RefusedError):
            _log.warning("access_denied", method=method, peer=context.peer(), reason=failure)
        else:
            _log.info("call_failed", method=method, peer=context.peer(), reason=failure)
        await abort(context, failure)


def _guarded(handler: Handler | None, guard: Guard) -> Handler | None:
    """The same handler, run inside `guard(context)`; None, a method that nobody serves, stays None."""
    if handler is None:
        return None
    if handler.request_streaming:
        behaviour = handler.stream_stream if handler.response_streaming else handler.stream_unary
    else:
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
    make = _MAKERS[handler.request_streaming, handler.response_streaming]
    # gRPC would answer bytes that do not parse with UNKNOWN, outside of every guard: so they are parsed inside.
    read = _reader(handler.request_deserializer, streaming=handler.request_streaming)
    if inspect.isasyncgenfunction(behaviour):
        wrapped = _guarded_generator(cast("Generator", behaviour), guard, read)
    else:  # one answer, or a stream written with context.write
        wrapped = _guarded_coroutine(cast("Coroutine", behaviour), guard, read)
    return make(wrapped, None, handler.response_serializer)


def _reader(parse: Deserializer | None, *, streaming: bool) -> Callable[[object], object]:
    """From what arrived to what a handler takes: a message, or an iterator of messages. None: parsed further in."""
    if parse is None:
        return lambda request: request
    if streaming:
        return lambda requests: _read_all(parse, cast("AsyncIterator[bytes]", requests))
    return lambda request: _read_one(parse, cast(bytes, request))


def _read_one(parse: Deserializer, data: bytes) -> object:
    try:
        return parse(data)
    except (DecodeError, ValueError):  # invalid UTF-8 in a string field is a ValueError
        raise BadInputError(f"{len(data)} bytes do not parse as a message of this call") from None


async def _read_all(parse: Deserializer, requests: AsyncIterator[bytes]) -> AsyncIterator[object]:
    async for data in requests:
        yield _read_one(parse, data)


def _guarded_coroutine(behaviour: Coroutine, guard: Guard, read: Callable[[object], object]) -> Coroutine:
    async def call(request: object, context: Context) -> object:
        async with guard(context):
            return await behaviour(read(request), context)

    return call


def _guarded_generator(behaviour: Generator, guard: Guard, read: Callable[[object], object]) -> Generator:
    async def iterate(request: object, context: Context) -> AsyncGenerator[object]:
        async with guard(context), contextlib.aclosing(behaviour(read(request), context)) as responses:
            async for response in responses:
                yield response

    return iterate

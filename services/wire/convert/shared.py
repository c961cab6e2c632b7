"""Sessions and objects, and what every conversion uses."""

import hashlib
from collections.abc import Iterable
from enum import Enum
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from heterorl.v1 import types_pb2
from services.runtime.errors import BadInputError
from services.wire import types as t
from services.wire.objects import is_object_id

_EnumT = TypeVar("_EnumT", bound=Enum)
_MessageT = TypeVar("_MessageT", bound=Message)


def enum_of(kind: type[_EnumT], value: int) -> _EnumT:
    try:
        return kind(value)
    except ValueError:
        raise BadInputError(f"{kind.__name__} {value} is not known; both ends need the same release") from None


def parse(message: _MessageT, data: bytes, what: str) -> _MessageT:
    try:
        message.ParseFromString(data)
    except (DecodeError, ValueError):  # invalid UTF-8 in a string field is a ValueError
        raise BadInputError(f"{len(data)} bytes do not parse as a {what}; send it again") from None
    return message


def to_session(session: t.Session) -> types_pb2.Session:
    return types_pb2.Session(
        run_id=session.run_id,
        sampler_id=session.sampler_id,
        learner_epoch=session.learner_epoch,
        session_epoch=session.session_epoch,
    )


def from_session(message: types_pb2.Session) -> t.Session:
    return t.Session(
        run_id=message.run_id,
        sampler_id=message.sampler_id,
        learner_epoch=message.learner_epoch,
        session_epoch=message.session_epoch,
    )


def to_object(ref: t.ObjectRef) -> types_pb2.ObjectRef:
    return types_pb2.ObjectRef(object_id=ref.object_id, size_bytes=ref.size_bytes)


def from_object(message: types_pb2.ObjectRef) -> t.ObjectRef:
    """Refuses anything but 64 lower-case hex digits, because the id becomes a file name."""
    if not is_object_id(message.object_id):
        raise BadInputError("an object id is not 64 lower-case hex digits; the peer is damaged or hostile")
    return t.ObjectRef(object_id=message.object_id, size_bytes=message.size_bytes)


def from_objects(messages: Iterable[types_pb2.ObjectRef]) -> tuple[t.ObjectRef, ...]:
    return tuple(from_object(message) for message in messages)


def model_files_sha256(files: Iterable[t.ModelFile]) -> str:
    """SHA-256 over the sorted lines "name object_id\\n": what samplers and learner compare."""
    lines = sorted(f"{file.name} {file.object.object_id}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()

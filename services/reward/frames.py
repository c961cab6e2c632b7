"""Length-prefixed JSON between the pool and its workers.

JSON and not pickle, because a worker that grades hostile text is not trusted; ASCII-only JSON, because lone surrogates
and NUL bytes pass through it unchanged.
"""

import json
import socket
import struct

HEADER = struct.Struct("!I")
FRAME_BYTES_MAX = 64 * 1024 * 1024


def encode(message: object) -> bytes:
    """The frame of one JSON value."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> object:
    """The JSON value of one frame's body."""
    value: object = json.loads(body)
    return value


def receive(connection: socket.socket) -> object | None:
    """The next value from a blocking socket; None at its end."""
    header = _receive_exactly(connection, HEADER.size)
    if header is None:
        return None
    body = _receive_exactly(connection, HEADER.unpack(header)[0])
    return None if body is None else decode(body)


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)

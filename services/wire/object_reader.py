"""Reads objects from a WeightService: checked chunks, on any link that still moves.

A chunk is the smallest thing that arrives: at 64 kbit/s one of 512 KiB takes longer than any sensible stall limit. So
after a stall the object is asked for in small pieces, which grow again while they come quickly.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

import grpc

from heterorl.v1 import weights_pb2
from services.runtime.errors import CorruptObjectError, UnavailableError
from services.wire.errors import peer_error
from services.wire.objects import CHUNK_BYTES, Chunk, verify_chunk

if TYPE_CHECKING:  # generated stubs exist for type checkers only
    from heterorl.v1.weights_pb2_grpc import WeightServiceAsyncStub

_FIRST_PIECE_BYTES = 64 << 10
_SMALLEST_PIECE_BYTES = 8 << 10
_QUICK_SHARE = 0.1
"""A piece that takes less than this share of the stall limit is followed by one twice as large."""


class ObjectReader:
    """`stall_s`: a read ends when it has waited so long for the next 8 KiB: a source that sends a byte now and then is
    no better than one that sends none. `wait_for_ready`: False fails at once where nobody listens."""

    def __init__(
        self,
        stub: "WeightServiceAsyncStub",
        *,
        stall_s: float,
        wait_for_ready: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stub = stub
        self._stall_s = stall_s
        self._wait_for_ready = wait_for_ready
        self._clock = clock
        self._piece_bytes = 0
        """Bytes asked for at once; 0 asks for all of an object."""

    async def read(self, object_id: str, offset: int, end: int = 0) -> AsyncGenerator[bytes]:
        """Chunks from `offset` to `end`, or for 0 to the object's end; close it when it is not read to its end.

        Raises UnavailableError (cut, stalled, a damaged chunk: read on from there), and what the server raised.
        """
        while not end or offset < end:
            asked, began, start = self._piece_bytes, self._clock(), offset
            if end:
                asked = min(asked or end - offset, end - offset)
            async for data in self._stream(object_id, offset, asked):
                offset += len(data)
                yield data
            if not asked or offset - start < asked:
                return
            if self._piece_bytes and self._clock() - began < _QUICK_SHARE * self._stall_s:
                larger = 2 * self._piece_bytes
                self._piece_bytes = larger if larger <= CHUNK_BYTES else 0

    async def _stream(self, object_id: str, offset: int, length: int) -> AsyncGenerator[bytes]:
        """One call. A server that sends more than `length` is cut off there."""
        request = weights_pb2.FetchObjectRequest(object_id=object_id, offset=offset, length=length)
        call = self._stub.FetchObject(request, wait_for_ready=self._wait_for_ready)
        end = offset + length if length else None
        waited_s, reached = 0.0, offset + _SMALLEST_PIECE_BYTES
        asked_s, start = self._clock(), offset
        try:
            while end is None or offset < end:
                began = self._clock()
                async with asyncio.timeout(self._stall_s - waited_s):
                    message = await call.read()
                if not isinstance(message, weights_pb2.FetchObjectResponse):
                    return
                data = message.data  # once: each look at it is a copy
                _check(Chunk(offset=message.offset, data=data, crc32c=message.crc32c), offset)
                offset += len(data)
                waited_s += self._clock() - began
                if offset >= reached:
                    waited_s, reached = 0.0, offset + _SMALLEST_PIECE_BYTES
                yield data
        except grpc.aio.AioRpcError as error:
            slow = offset == start and self._clock() - asked_s > _QUICK_SHARE * self._stall_s
            if slow and error.code() is grpc.StatusCode.UNAVAILABLE:
                self._ask_for_less()  # what was asked for stands before the answer to a ping, and that came too late
            raise peer_error(error) from None
        except TimeoutError:
            self._ask_for_less()
            raise UnavailableError(f"next to no weights came for {self._stall_s:.0f} s") from None
        finally:
            call.cancel()

    def _ask_for_less(self) -> None:
        smaller = self._piece_bytes // 2 if self._piece_bytes else _FIRST_PIECE_BYTES
        self._piece_bytes = max(_SMALLEST_PIECE_BYTES, smaller)


def _check(chunk: Chunk, offset: int) -> None:
    """Raises UnavailableError for a chunk that cannot be used: the read goes on from the bytes before it."""
    try:
        verify_chunk(chunk, offset)
    except CorruptObjectError as error:
        raise UnavailableError(f"a chunk cannot be used: {error}") from error
    if not chunk.data:
        raise UnavailableError("a chunk is empty")

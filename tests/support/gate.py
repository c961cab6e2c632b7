"""Updates that take as long as a test wants."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Gate:
    """In front of a function that makes an update: `calls` counts, and nothing comes out before `open`."""

    def __init__(self, make: Callable[..., Iterator[bytes]]) -> None:
        self._make = make
        self._open = threading.Event()
        self._called = threading.Event()
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Iterator[bytes]:
        self.calls += 1
        self._called.set()
        assert self._open.wait(20)
        yield from self._make(*arguments, **options)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self._called.wait, 20)

    def open(self) -> None:
        self._open.set()

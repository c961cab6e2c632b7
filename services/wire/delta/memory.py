"""Memory for the versions of one policy: what nobody holds any more is used for the next one.

A fresh block costs a page fault for every page written, and the system clears each page first. That takes longer than
the copy of the weights itself: ten times and more on a virtual machine whose host has taken back what was free.
"""

import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray


class Memory:
    """At most one block lies unused, of the size that was returned last. For any thread."""

    def __init__(self) -> None:
        self._spare: deque[NDArray[np.uint8]] = deque(maxlen=1)

    def take(self, size: int) -> NDArray[np.uint8]:
        """*Produces* a block of that many bytes (1 at least) with any content. It comes back by itself, when the array
        and all views of it are gone."""
        size = max(1, size)
        try:
            block = self._spare.pop()
        except IndexError:
            block = None
        if block is None or block.size != size:
            block = np.empty(size, np.uint8)
        # An array over a buffer of another type: views of it keep it alive, and not only the block that it stands on.
        lent = np.frombuffer(block.data, np.uint8)
        weakref.finalize(lent, self._spare.append, block).atexit = False
        return lent

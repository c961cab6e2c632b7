"""Keys and values of the running batch in preallocated buffers.

transformers' DynamicCache copies the whole cache at every token; this one writes the new column in place, and copies
only when rows come, go, or the buffer is full. Rows are padded on the left, so all rows end in the same column.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_GROWTH_COLUMNS = 16


class BufferLayer(CacheLayerMixin):
    """One attention layer: keys and values of shape (rows, heads, capacity, head size), `length` columns filled.

    Keeps every column also for sliding-window layers: their mask hides what is out of the window.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends columns; returns all filled ones as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            capacity = end + max(_GROWTH_COLUMNS, end // 4)
            self.keys = _with_capacity(self.keys, self.length, capacity)
            self.values = _with_capacity(self.values, self.length, capacity)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def filled(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Takes over tensors that are filled to the end."""
        self.keys, self.values = keys, values
        self.length = keys.shape[2]
        self.is_initialized = True


def new_cache() -> Cache:
    """An empty cache; layers appear as the model asks for them."""
    return Cache(layer_class_to_replicate=BufferLayer)


def length_of(cache: Cache) -> int:
    """Filled columns."""
    return _layers(cache)[0].length


def select_rows(cache: Cache, rows: Tensor, first_column: int) -> None:
    """Keeps `rows` (int64 indices, repeats allowed), and drops the columns before `first_column`."""
    for layer in _layers(cache):
        keys, values = layer.filled()
        layer.replace(
            keys[:, :, first_column:].index_select(0, rows), values[:, :, first_column:].index_select(0, rows)
        )


def append_rows(cache: Cache, more: Cache) -> None:
    """Puts the rows of `more` below those of `cache`, aligned at the last column."""
    length = max(length_of(cache), length_of(more))
    for upper, lower in zip(_layers(cache), _layers(more), strict=True):
        upper_keys, upper_values = upper.filled()
        lower_keys, lower_values = lower.filled()
        upper.replace(_stack(upper_keys, lower_keys, length), _stack(upper_values, lower_values, length))


def _layers(cache: Cache) -> list[BufferLayer]:
    return [layer for layer in cache.layers if isinstance(layer, BufferLayer)]


def _with_capacity(filled: Tensor, length: int, capacity: int) -> Tensor:
    rows, heads, _, size = filled.shape
    # Zeros, not empty: a masked column of NaN would still poison a row (0 × NaN).
    grown = torch.zeros((rows, heads, capacity, size), dtype=filled.dtype, device=filled.device)
    grown[:, :, :length] = filled[:, :, :length]
    return grown


def _stack(upper: Tensor, lower: Tensor, length: int) -> Tensor:
    _, heads, _, size = upper.shape
    rows = upper.shape[0] + lower.shape[0]
    stacked = torch.zeros((rows, heads, length, size), dtype=upper.dtype, device=upper.device)
    stacked[: upper.shape[0], :, length - upper.shape[2] :] = upper
    stacked[upper.shape[0] :, :, length - lower.shape[2] :] = lower
    return stacked

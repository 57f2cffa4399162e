"""Keys and values of the settled prefix: one buffer of the needed length, rolled back by moving a number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """Cache layer that writes into a buffer allocated once and attends over its used part only.

    `StaticCache` attends over the whole buffer, `DynamicCache` copies the whole prefix each step; this does neither.
    """

    is_sliding = False
    # None until the first update, and not used before
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, max_length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.max_length = max_length
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate (B, H, max_length, D) buffers of the states' dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros((*key_states.shape[:2], self.max_length, key_states.shape[3]))
        self.values = value_states.new_zeros((*value_states.shape[:2], self.max_length, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, Q, D) states; return views (B, H, L + Q, D) of the used part."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number of keys and offset of the first, as transformers' masks need them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return L."""
        return self.length

    def get_max_length(self) -> int:
        """Return the length of the buffer."""
        return self.max_length


class KVCache:
    """One model's cache with the three verbs of decoding: length, rollback, keep.

    Args:
        max_length: tokens it must hold at once, the slots of a block included.
    """

    def __init__(self, max_length: int) -> None:
        new_layer: Any = partial(PreallocatedLayer, max_length)  # transformers calls it once per layer of the model
        self.past_key_values = Cache(layer_class_to_replicate=new_layer)

    @property
    def length(self) -> int:
        """L, tokens in the cache."""
        return max((layer.length for layer in self._layers()), default=0)

    def rollback(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        for layer in self._layers():
            layer.length = length

    def keep(self, start: int, slots: Sequence[int]) -> None:
        """Keep the first `start` tokens and, behind them, only those of the block's `slots` that stand there.

        Slots that already stand in a row, as the accepted candidates of a chain do, cost nothing.
        """
        if list(slots) != list(range(len(slots))):
            for layer in self._layers():
                for states in (layer.keys, layer.values):
                    source = torch.tensor(slots, device=states.device) + start
                    states[:, :, start : start + len(slots)] = states[:, :, source]
        self.rollback(start + len(slots))

    def _layers(self) -> list[PreallocatedLayer]:
        return [layer for layer in self.past_key_values.layers if isinstance(layer, PreallocatedLayer)]

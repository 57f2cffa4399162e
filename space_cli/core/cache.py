"""Keys and values of the settled prefix: one buffer, rolled back by moving a number, kept from answer to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(slots=True)
class Extent:
    """How much of their buffers all layers of a cache show: the used part, rounded up to a multiple."""

    multiple: int = 1

    def of(self, used: int) -> int:
        """Return the number of slots shown when `used` are in use."""
        return -(-used // self.multiple) * self.multiple


class PreallocatedLayer(CacheLayerMixin):
    """Cache layer that writes into a buffer allocated ahead and attends over its used part only.

    `StaticCache` attends over the whole buffer, `DynamicCache` copies the whole prefix each step; this does neither.
    """

    is_sliding = False
    # None until the first update, and not used before
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, max_length: int, extent: Extent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.max_length = max_length
        self.extent = extent
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
        """Append (B, H, Q, D) states; return views (B, H, N, D) of the part shown, L + Q slots or more."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if self.extent.of(end) > self.keys.shape[2]:
            self._grow()
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        shown = self.extent.of(end)
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    def _grow(self) -> None:
        """Copy what is held into buffers of the length that is now allowed."""
        for name in ("keys", "values"):
            held = getattr(self, name)
            longer = held.new_zeros((*held.shape[:2], self.max_length, held.shape[3]))
            longer[:, :, : self.length] = held[:, :, : self.length]
            setattr(self, name, longer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number of keys and offset of the first, as transformers' masks need them."""
        return self.extent.of(self.length + query_length), 0

    def get_seq_length(self) -> int:
        """Return L."""
        return self.length

    def get_max_length(self) -> int:
        """Return the length of the buffer."""
        return self.max_length


class KVCache:
    """One model's cache with the verbs of decoding: length, rollback, keep; it may outlive a generation.

    Attributes:
        extent: of all layers; a multiple above 1 needs a mask over the slots not in use.
        token_ids: what the settled prefix holds, so that a later prompt that begins alike is not computed again.
    """

    def __init__(self) -> None:
        self.extent = Extent()
        self.token_ids: list[int] = []
        self._max_length = 0
        # transformers calls it once per layer of the model
        self.past_key_values = Cache(layer_class_to_replicate=cast(Any, self._new_layer))

    def _new_layer(self) -> PreallocatedLayer:
        return PreallocatedLayer(self._max_length, self.extent)

    def reserve(self, max_length: int) -> None:
        """Make room for so many tokens at once, the slots of a block included; what is held stays."""
        if max_length > self._max_length:
            self._max_length = max_length
            for layer in self._layers():
                layer.max_length = max_length

    @property
    def length(self) -> int:
        """L, tokens in the cache."""
        return max((layer.length for layer in self._layers()), default=0)

    def rollback(self, length: int) -> None:
        """Forget everything behind the first `length` tokens."""
        del self.token_ids[length:]
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

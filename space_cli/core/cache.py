"""Keys and values of the committed prefix, in preallocated buffers that are cropped by changing a length."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(slots=True)
class CacheCapacity:
    """The size of a cache, shared by its layers: allocated slots, and how many of them attention is shown.

    Attributes:
        slots: that a buffer must have, made longer when next written to.
        multiple: the used part is shown rounded up to it.
        allocations: buffers made so far; while it stays, they stay where they are.
    """

    slots: int = 0
    multiple: int = 1
    allocations: int = 0

    def shown(self, used: int) -> int:
        """Return how many slots attention is shown when `used` are in use."""
        return -(-used // self.multiple) * self.multiple


class PreallocatedLayer(CacheLayerMixin):
    """A cache layer with a preallocated buffer, of which attention sees the used part only.

    `StaticCache` attends over the whole buffer, `DynamicCache` copies the whole prefix each step; this does neither.
    """

    is_sliding = False
    # None until the first update, and not used before
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: CacheCapacity) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate (B, H, capacity, D) buffers of the states' dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (_zeros(states, self.capacity.slots) for states in (key_states, value_states))
        self.is_initialized = True
        self.capacity.allocations += 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, Q, D) states; return views (B, H, N, D) of the part shown, L + Q slots or more."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self.make_room(end)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        shown = self.capacity.shown(end)
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    def make_room(self, end: int) -> None:
        """Grow the buffers if they hold fewer than `end` slots."""
        if self.capacity.shown(end) <= self.keys.shape[2]:
            return
        for name in ("keys", "values"):
            held = getattr(self, name)
            longer = _zeros(held, self.capacity.slots)
            longer[:, :, : self.length] = held[:, :, : self.length]
            setattr(self, name, longer)
        self.capacity.allocations += 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number of keys and offset of the first, as transformers' masks need them."""
        return self.capacity.shown(self.length + query_length), 0

    def get_seq_length(self) -> int:
        """Return L."""
        return self.length

    def get_max_length(self) -> int:
        """Return the length of the buffer."""
        return self.capacity.slots


def _zeros(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return (B, H, capacity, D) zeros of the dtype and device of (B, H, Q, D) states."""
    shape = (*states.shape[:2], capacity, states.shape[3])
    if states.device.type != "cpu":
        return states.new_zeros(shape)
    # the system hands out zeroed pages as they are written to; filling them takes longer than a short prompt
    size = math.prod(shape) * states.element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(states.dtype).view(shape)


class KVCache:
    """The KV cache of one model: length, crop, commit. It may be reused by the next generation.

    Attributes:
        capacity: of all layers; a multiple above 1 needs a mask over the slots not in use.
        token_ids: what the committed prefix holds, so that a later prompt that begins alike is not computed again.
    """

    def __init__(self) -> None:
        self.capacity = CacheCapacity()
        self.token_ids: list[int] = []
        # transformers calls it once per layer of the model
        self.cache = Cache(layer_class_to_replicate=cast(Any, partial(PreallocatedLayer, self.capacity)))

    def reserve(self, max_length: int) -> None:
        """Reserve room for `max_length` tokens, the slots of a block included; cached tokens stay."""
        self.capacity.slots = max(max_length, self.capacity.slots)

    @property
    def length(self) -> int:
        """L, tokens in the cache."""
        return max((layer.length for layer in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        """Size of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)

    def fork(self, length: int) -> KVCache:
        """Return a copy that holds the first `length` tokens."""
        copy = KVCache()
        copy.token_ids = self.token_ids[:length]
        copy.reserve(length)
        for index, layer in enumerate(self.layers):
            copy.layer(index).update(layer.keys[:, :, :length], layer.values[:, :, :length])
        return copy

    def crop(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""
        del self.token_ids[length:]
        for layer in self.layers:
            layer.length = length

    def commit(self, start: int, slots: Sequence[int]) -> None:
        """Keep the first `start` tokens and, of the block that follows them, the slots `slots` (ascending).

        Slots that are already consecutive, like the accepted candidates of a chain, need no copy.
        """
        if slots and slots[-1] != len(slots) - 1:
            for layer in self.layers:
                for states in (layer.keys, layer.values):
                    source = torch.tensor(slots, device=states.device) + start
                    states[:, :, start : start + len(slots)] = states[:, :, source]
        self.crop(start + len(slots))

    def layer(self, index: int) -> PreallocatedLayer:
        """Return a layer; create it if the model has not used it yet."""
        layers = self.cache.layers
        while len(layers) <= index:
            layers.append(PreallocatedLayer(self.capacity))
        return cast(PreallocatedLayer, layers[index])

    @property
    def layers(self) -> list[PreallocatedLayer]:
        """The layers; none before the first call."""
        return cast(list[PreallocatedLayer], self.cache.layers)


def cache_arguments(module: nn.Module, cache: Cache) -> dict[str, Any]:
    """Return the arguments that hand a cache to a transformers model, which renamed the first in version 5.24."""
    return {_cache_parameter(type(module).forward): cache, "use_cache": True}


@lru_cache
def _cache_parameter(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

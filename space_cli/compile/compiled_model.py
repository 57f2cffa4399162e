"""A compiled model: one call for blocks of all shapes, with packed weights and an attention of our own.

A small model's eager step is spent on dispatch, a large one's on matrix products over weights that are not packed for
them. `torch.export` and AOTInductor answer the first: the whole call becomes one C++ library, for any number of slots.
Two operators of our own answer the second. `space::packed_linear` multiplies by packed weights (`kernels/linear.cpp`),
those of layers with the same input, like queries, keys and values, in one go. `space::cached_attention` appends to the
cache and reads its used part only (`kernels/attend.cpp`); so what is compiled knows neither the cache nor its length,
and one compilation serves prompts and blocks of all sizes. Both give a row the same bits whatever rows stand beside it.
No weights are compiled in: they are packed when it is loaded, and models of one architecture share it.

Source: PyTorch's AOTInductor (`torch/_inductor/__init__.py`).
"""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from space_cli.compile import torch_private
from space_cli.compile.export import GROUPS, MAX_CALL_SLOTS, STATES, CompiledCall, first_slots
from space_cli.compile.packing import Adapter, packed_layers
from space_cli.compile.toolchain import load_kernels
from space_cli.core.block import Block
from space_cli.core.cache import KVCache
from space_cli.core.engine import EagerEngine
from space_cli.core.sampling import TopK


class CompiledModel:
    """A compiled model, loaded.

    Args:
        package: what `compile_model` wrote for a model of this architecture.
        kernels: what `build_kernels` wrote.
        model: whose weights it computes with.
        adapter: that the model carries.
    """

    def __init__(self, package: Path, kernels: Path, model: PreTrainedModel, adapter: Adapter | None = None) -> None:
        self._kernels = load_kernels(kernels)
        self._package = torch_private.load_package(package)
        metadata = self._package.get_metadata()
        self._states: list[list[int]] = json.loads(metadata[STATES])
        self._dtype = model.dtype
        with torch.no_grad(), packed_layers(model, json.loads(metadata[GROUPS]), adapter):
            step = CompiledCall(model)
            tensors = {
                name: tensor.detach()
                for name, tensor in chain(
                    step.named_parameters(remove_duplicate=False), step.named_buffers(remove_duplicate=False)
                )
            }
        asked = self._package.get_constant_fqns()
        unknown = [name for name in asked if name not in tensors]
        if unknown:
            raise RuntimeError(f"it asks for {unknown[0]}, which the model does not have")
        # keep a reference: the package borrows these tensors; their own memory is aligned to cache lines
        self._weights = {name: tensors[name] for name in asked}
        self._package.load_constants(self._weights, False, True, True)
        self._cached_call: tuple[weakref.ref[KVCache], int, _Call] | None = None

    def run(
        self, block: Block, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: KVCache, *, logits_to_keep: int
    ) -> tuple[torch.Tensor, TopK]:
        """Run a block after the cached tokens; return logits and top-k tokens. The cache then holds all its slots.

        Args:
            block: its shape.
            input_ids: (1, Q) int64.
            position_ids: (1, Q) int64.
            cache: with room for the block.
            logits_to_keep: W, of how many slots logits (W, V) are to be computed, from the first one on.
        """
        call = self._call(cache, block.num_slots)
        call.parents, call.length, call.tokens = _parents(block), cache.length, block.num_tokens
        self._kernels.space_begin(ctypes.byref(call))
        inputs = [input_ids, position_ids, _mask_like(block.num_slots), first_slots(logits_to_keep)]
        logits, tokens, probs = self._package.boxed_run(inputs)
        for layer in cache.layers:
            layer.length += block.num_slots
        return logits, TopK(tokens, probs)

    def engine(self, model: PreTrainedModel, **arguments: Any) -> EagerEngine:
        """Return the engine that runs the model by this; arguments are those of `EagerEngine`."""
        return CompiledEngine(model, self, **arguments)

    def _call(self, cache: KVCache, slots: int) -> _Call:
        """Return the addresses of a cache's buffers, grown to hold `slots` more."""
        if self._cached_call is not None:
            of_cache, allocations, call = self._cached_call
            fits = cache.length + slots <= call.capacity
            if of_cache() is cache and cache.capacity.allocations == allocations and fits:
                return call
        layers = [cache.layer(index) for index in range(len(self._states))]
        for layer, (heads, width, value_width) in zip(layers, self._states, strict=True):
            if not layer.is_initialized:
                keys, values = (torch.empty(1, heads, 0, size, dtype=self._dtype) for size in (width, value_width))
                layer.lazy_initialization(keys, values)
            layer.make_room(layer.length + slots)
        addresses = ctypes.c_void_p * len(layers)
        call = _Call(
            keys=addresses(*[layer.keys.data_ptr() for layer in layers]),
            values=addresses(*[layer.values.data_ptr() for layer in layers]),
            capacity=layers[0].keys.shape[2],
        )
        self._cached_call = weakref.ref(cache), cache.capacity.allocations, call
        return call


class _Call(ctypes.Structure):
    """What `space::cached_attention` must know of the running call beyond its arguments; as in `kernels/kernels.h`."""

    _fields_ = (
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("parents", ctypes.POINTER(ctypes.c_int32)),
        ("length", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


@lru_cache(maxsize=4096)
def _parents(block: Block) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * block.num_slots)(*block.parents)


@lru_cache
def _mask_like(slots: int) -> torch.Tensor:
    """Return a mask of which the shape alone is read."""
    return torch.empty(1, 1, 1, 1).expand(1, 1, slots, slots)


class CompiledEngine(EagerEngine):
    """Runs blocks, and the prompt in blocks of its own, through a compiled model."""

    def __init__(self, model: PreTrainedModel, compiled: CompiledModel, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self._compiled = compiled
        self.cache.capacity.multiple = 1
        self._inputs: dict[int, _Inputs] = {}

    def _extend(self, token_ids: Sequence[int]) -> None:
        for start in range(0, len(token_ids), MAX_CALL_SLOTS):
            some = token_ids[start : start + MAX_CALL_SLOTS]
            # no logits are needed for prompt tokens
            self._run(Block.chain(len(some) - 1, 0), some, logits_to_keep=1)

    def run(self, block: Block, slot_ids: Sequence[int]) -> torch.Tensor:
        """Run a block after the committed prefix; return (Q, V) logits. The cache then holds all slots of the block."""
        self._slot_ids = slot_ids
        return self._run(block, slot_ids, logits_to_keep=block.num_slots)

    def _run(self, block: Block, slot_ids: Sequence[int], *, logits_to_keep: int) -> torch.Tensor:
        inputs = self._inputs.get(block.num_slots)
        if inputs is None:
            inputs = self._inputs[block.num_slots] = _Inputs(block.num_slots)
        inputs.ids[:] = slot_ids
        np.add(block.offset_ids, self.length, out=inputs.positions)
        np.minimum(inputs.positions, self._last_position, out=inputs.positions)
        logits, self.top_k = self._compiled.run(block, *inputs.tensors, self.cache, logits_to_keep=logits_to_keep)
        return logits


class _Inputs:
    """Input tensors of calls of one size, written in place: creating tensors takes longer than a small layer.

    Attributes:
        ids: (Q) int64.
        positions: (Q) int64.
        tensors: the same memory, (1, Q) each.
    """

    def __init__(self, slots: int) -> None:
        self.ids, self.positions = np.zeros((2, slots), dtype=np.int64)
        self.tensors = torch.from_numpy(self.ids)[None], torch.from_numpy(self.positions)[None]

"""A model whose steps are CUDA graphs: one launch and one small copy for a whole step, whatever the block.

`CudaGraphModel` runs a model over buffers that never move, once for every number of rows, and keeps the work of the GPU
as a graph: choosing included. Per step the host copies token ids, positions and ancestors to the device, launches the
graph and copies the most probable tokens back, which is the only wait.

Rows are padded to whole tiles (32, then multiples of 64), so that AR and SPACE run the very same graph: a row then
meets the same kernels, whatever the block, and no library's choice of a kernel by shape can round it otherwise. What a
row sees of the cache is computed in splits of fixed size (`cuda_attention`). Plain numerics run smaller sizes as well.

On a CPU the same code runs without graphs; that is for tests.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from space_cli.compile import torch_private
from space_cli.compile.cuda_attention import NAME, NOTING, BlockTensors, LayerShape
from space_cli.core.attention import has_replaceable_attention
from space_cli.core.block import Block
from space_cli.core.cache import KVCache
from space_cli.core.engine import EagerEngine
from space_cli.core.sampling import TOP_K, TopK
from space_cli.errors import RunFailed

TILES = (32, 64)
"""Rows of a call in invariant numerics; what needs more is rounded up to a multiple of the last."""
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 36, 64)
"""Rows of a call in plain numerics: those of the CPU's engine, the paper's largest chain, and the last tile."""
MAX_MOVED = 1024
"""Tokens that a step can commit."""
_MIN_CAPACITY = 2048
_WARM_UPS = 2
# kinds of layers that are compiled, times sizes
_MAX_COMPILATIONS = 64


@runtime_checkable
class MaskEmbedding(Protocol):
    """Input embeddings, as an adapter's, that are set beforehand to whether a call has mask slots."""

    num_text_embeddings: int
    masks_known: bool | None


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return in a few words why a model cannot run as CUDA graphs, or None if it can."""
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its layers are on several devices"
    if not has_replaceable_attention(model):
        return "its attention is its own"
    return None


def rows_of(slots: int, sizes: Sequence[int]) -> int:
    """Return `slots` padded to the next of the ascending `sizes`, or to a multiple of the last."""
    return next((size for size in sizes if size >= slots), -(-slots // sizes[-1]) * sizes[-1])


class CudaGraphModel:
    """A model whose steps run as CUDA graphs.

    Args:
        model: on one device.
        fused: whether PyTorch's compiler fuses what stands between the layers' matrix products; takes ten seconds or
            more for each number of rows, and leaves half the kernels of a step.

    Raises:
        RunFailed: the model's layers hold keys or values of different shapes.
    """

    def __init__(self, model: PreTrainedModel, *, fused: bool = False) -> None:
        self.model, self.device = model, model.device
        layers = _layer_shapes(model)
        if len({shape[1:] for shape in layers}) != 1 or layers[0].width != layers[0].value_width:
            raise RunFailed("the keys and values of its layers have different shapes")
        self._attentions = [shape.module for shape in layers]
        self._heads, self._width = layers[0].key_heads, layers[0].width
        self._states = self._buffers(0)
        self._compiled = _compiled_layers(model) if fused else {}
        self._steps: dict[tuple[int, bool], _Step] = {}
        self._pool: Any = None
        self._owner: tuple[weakref.ref[KVCache], int] | None = None
        embedding = model.get_input_embeddings()
        self._mask_embedding = embedding if isinstance(embedding, MaskEmbedding) else None
        self._moves = _Staged(MAX_MOVED, torch.int64, self.device)

    @torch.inference_mode()
    def lend(self, cache: KVCache, slots: int) -> None:
        """Make the layers of a cache views of the graphs' buffers, with room for `slots` slots.

        The cache that used the buffers before gets a copy of its part first.
        """
        slots = max(slots, cache.capacity.slots)
        if self._lent_to(cache) and slots <= self._states.shape[3]:
            return
        self._take_back()
        if slots > self._states.shape[3]:
            self._steps.clear()
            self._states = self._buffers(max(_MIN_CAPACITY, 1 << (slots - 1).bit_length()))
        capacity = self._states.shape[3]
        for index, states in enumerate(self._states):
            layer = cache.layer(index)
            if layer.is_initialized:
                states[0, :, : layer.length] = layer.keys[0, :, : layer.length]
                states[1, :, : layer.length] = layer.values[0, :, : layer.length]
            layer.keys, layer.values = states[0][None], states[1][None]
            layer.dtype, layer.device, layer.is_initialized = states.dtype, states.device, True
        cache.capacity.slots = capacity
        cache.capacity.allocations += 1
        self._owner = weakref.ref(cache), cache.capacity.allocations

    @torch.inference_mode()
    def run(
        self, block: Block, slot_ids: Sequence[int], cache: KVCache, *, rows: int, last_position: int
    ) -> tuple[torch.Tensor, TopK]:
        """Run a block after the cached tokens; return logits and top-k tokens. The cache then holds all its slots.

        Args:
            block: its shape.
            slot_ids: the token id in each slot.
            cache: of this model.
            rows: of the call, as many as slots or more.
            last_position: that a slot may have.

        Returns:
            (Q, V) logits, and on the host the most probable tokens of each row.
        """
        length = cache.length
        self.lend(cache, length + rows)
        has_masks = self._mask_embedding is not None and max(slot_ids) >= self._mask_embedding.num_text_embeddings
        step = self._steps.get((rows, has_masks))
        if step is None:
            step = self._steps[rows, has_masks] = _Step(rows, self.device)
        step.fill(block, slot_ids, length, last_position)
        if step.graph is not None:
            step.graph.replay()
        else:
            self._first(step, has_masks)
        found = step.top_k.fetch()[: block.num_slots]
        for layer in cache.layers:
            layer.length = length + block.num_slots
        tokens, probs = found[:, :TOP_K].long(), found[:, TOP_K:].contiguous().view(torch.float32)
        return step.logits[: block.num_slots].clone(), TopK(tokens, probs)

    @torch.inference_mode()
    def commit(self, cache: KVCache, start: int, slots: Sequence[int]) -> None:
        """Keep these ascending slots alone of a block that begins at `start`: `KVCache.commit`, all layers at once."""
        if slots and slots[-1] != len(slots) - 1:
            if not self._lent_to(cache):
                cache.commit(start, slots)
                return
            source = self._moves.put([start + slot for slot in slots])
            self._states[:, :, :, start : start + len(slots)] = self._states.index_select(3, source)
        cache.crop(start + len(slots))

    def engine(self, model: PreTrainedModel, **arguments: Any) -> EagerEngine:
        """Return the engine that runs the model by this; arguments are those of `EagerEngine`."""
        from space_cli.compile.cuda_engine import GraphEngine  # which is written for this class

        return GraphEngine(model, self, **arguments)

    def _buffers(self, capacity: int) -> torch.Tensor:
        """Return (layers, 2, H_kv, capacity, D) zeros: keys and values."""
        shape = (len(self._attentions), 2, self._heads, capacity, self._width)
        return torch.zeros(shape, dtype=self.model.dtype, device=self.device)

    def _lent_to(self, cache: KVCache) -> bool:
        return self._owner is not None and self._owner[0]() is cache and self._owner[1] == cache.capacity.allocations

    def _take_back(self) -> None:
        """Copy the buffers' content into the cache that uses them."""
        owner = None if self._owner is None else self._owner[0]()
        if owner is None or not self._lent_to(owner):
            return
        for layer in owner.layers:
            layer.keys, layer.values = (each[:, :, : layer.length].clone() for each in (layer.keys, layer.values))
        owner.capacity.allocations += 1

    def _first(self, step: _Step, has_masks: bool) -> None:
        """Run a step; on a GPU, capture it as a graph."""
        with self._bound(step, has_masks):
            if self.device.type != "cuda":
                self._call(step)
                return
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._call(step)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads may go on allocating meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._call(step)
        graph.replay()
        step.graph = graph

    def _call(self, step: _Step) -> None:
        """Compute the step's outputs from its inputs."""
        input_ids, position_ids = step.input_ids.long()[None], step.position_ids.long()[None]
        # read for its shape, if at all
        mask = torch.empty(1, 1, 1, 1, dtype=self.model.dtype, device=self.device).expand(1, 1, step.rows, step.rows)
        call = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        step.logits = self.model(**call).logits[0]
        step.top_k.hold(_top_k(step.logits))

    @contextmanager
    def _bound(self, step: _Step, has_masks: bool) -> Iterator[None]:
        """Use our attention, buffers and compiled layers in the model within the context."""
        config, mask_embedding = self.model.config, self._mask_embedding
        with ExitStack() as stack:
            own, config._attn_implementation = config._attn_implementation, NAME
            stack.callback(setattr, config, "_attn_implementation", own)
            for module, states in zip(self._attentions, self._states, strict=True):
                module.space_states, module.space_block = states, step.block  # type: ignore[assignment]
                stack.callback(_forget, module, "space_states", "space_block")
            for layer, compiled in self._compiled.items():
                torch_private.use_call(layer, compiled)
                stack.callback(torch_private.use_call, layer, None)
            if mask_embedding is not None:
                mask_embedding.masks_known = has_masks
                stack.callback(setattr, mask_embedding, "masks_known", None)
            if self._compiled:
                stack.enter_context(torch_private.recompile_limit(_MAX_COMPILATIONS))
            yield


class _Step:
    """Inputs and outputs of calls with one number of rows, at fixed addresses.

    Attributes:
        input_ids: (R) int32.
        position_ids: (R) int32.
        block: what the attention must know.
        logits: (R, V), of the last call.
        top_k: (R, 2 * TOP_K) int32: tokens, and the bits of their probabilities.
        graph: of the call, where it is one.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self._inputs = _Staged(1 + 3 * rows + rows * rows, torch.int32, device)
        length, self.input_ids, self.position_ids, depths, ancestors = self._inputs.on_device.split(
            [1, rows, rows, rows, rows * rows]
        )
        self.block = BlockTensors(length, depths, ancestors.view(rows, rows))
        self.top_k = _Fetched((rows, 2 * TOP_K), device)
        self.logits = torch.empty(0)
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, block: Block, slot_ids: Sequence[int], length: int, last_position: int) -> None:
        """Send a block after `length` tokens to the device; unused rows hold its first token."""
        rows, slots, inputs = self.rows, block.num_slots, self._inputs.on_host
        inputs[0] = length
        inputs[1 : 1 + rows] = slot_ids[0]
        inputs[1 : 1 + slots] = slot_ids
        depths, ancestors = _ancestry(block, rows)
        np.clip(depths + length, 0, last_position, out=inputs[1 + rows : 1 + 2 * rows])
        inputs[1 + 2 * rows : 1 + 3 * rows] = depths
        inputs[1 + 3 * rows :] = ancestors
        self._inputs.send()


class _Staged:
    """A buffer that is written on the host and copied to a fixed place on the device without waiting."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")
        self.on_host: np.ndarray = self._host.numpy()
        self.on_device = torch.zeros(size, dtype=dtype, device=device)

    def send(self) -> None:
        """Copy all of it; the host may write again after waiting for any later work."""
        self.on_device.copy_(self._host, non_blocking=True)

    def put(self, numbers: Sequence[int]) -> torch.Tensor:
        """Send these numbers and return where they are on the device."""
        self.on_host[: len(numbers)] = numbers
        self.send()
        return self.on_device[: len(numbers)]


class _Fetched:
    """A buffer that is copied from the device; the host waits for it."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self._on_host = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._on_device = torch.zeros(shape, dtype=torch.int32, device=device)

    def hold(self, numbers: torch.Tensor) -> None:
        """Copy a result on the device."""
        self._on_device.copy_(numbers)

    def fetch(self) -> torch.Tensor:
        """Return a copy on the host. This is the one synchronisation of a step."""
        self._on_host.copy_(self._on_device, non_blocking=True)
        if self._on_device.device.type == "cuda":
            torch.cuda.current_stream(self._on_device.device).synchronize()
        return self._on_host.clone()


def _top_k(logits: torch.Tensor) -> torch.Tensor:
    """Return (R, 2 * TOP_K) int32 of (R, V) logits: the most probable tokens, and their probabilities as bits.

    Of equal largest logits the first comes first, which `topk` does not promise.
    """
    scores = logits.float()
    first = scores.argmax(dim=-1, keepdim=True)
    rest = scores.scatter(1, first, -torch.inf).topk(TOP_K - 1, dim=-1)
    probs = (torch.cat([scores.gather(1, first), rest.values], dim=1) - scores.logsumexp(dim=-1, keepdim=True)).exp()
    return torch.cat([torch.cat([first, rest.indices], dim=1).int(), probs.view(torch.int32)], dim=1)


@lru_cache(maxsize=4096)
def _ancestry(block: Block, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (R) depths and (R * R) ancestors by row and depth, as in `BlockTensors`; rows too many see themselves."""
    depths, ancestors = np.full(rows, -1, dtype=np.int32), np.full((rows, rows), -1, dtype=np.int32)
    for slot in range(block.num_slots):
        # an ancestor stands in a lower slot than what it is an ancestor of
        path = np.flatnonzero(block.visibility[slot])
        depths[slot], ancestors[slot, : len(path)] = len(path) - 1, path
    ancestors[block.num_slots :, 0] = np.arange(block.num_slots, rows)
    return depths, ancestors.reshape(-1)


@torch.no_grad()
def _layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Return the attention layers in the order of their calls."""
    noted: list[LayerShape] = []
    own, model.config._attn_implementation = model.config._attn_implementation, NOTING
    for module in model.modules():
        module.space_noted = noted  # type: ignore[assignment]
    try:
        model(input_ids=torch.ones(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        model.config._attn_implementation = own
        for module in model.modules():
            _forget(module, "space_noted")
    return noted


def _forget(module: nn.Module, *names: str) -> None:
    for name in names:
        delattr(module, name)


def _compiled_layers(model: PreTrainedModel) -> dict[nn.Module, Callable[..., Any]]:
    """Return by layer its call, to be compiled when first made; layers of one kind share what is compiled."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return {layer: torch_private.compiled_call(layer) for layer in layers}

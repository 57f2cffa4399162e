"""Linear layers over packed weights, as a compiled model calls them.

Layers with one input, like queries, keys and values, are multiplied in one call. An adapter's low-rank update is part
of the call, in 8 bits, and touches the rows of mask slots alone: all other rows keep the bits of the untouched model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from space_cli.core.pages import LargePages
from space_cli.core.quantized import QuantizedLinear, WeightType, quantize

LANES = 16
_CHUNK = 32
"""Inputs with one scale, where they are rounded to 8 bits."""
# inputs that stand together in a tile of weights
_DEPTH = {torch.float32: 1, torch.bfloat16: 2}
_PLAIN = 0
"""In the place of a `WeightType`: weights of the activations' own dtype."""


class LowRank(NamedTuple):
    """What an adapter adds to a layer: `up @ (down @ input)`.

    Attributes:
        down: (rank, inputs).
        up: (outputs, rank), with the update's scale in it.
    """

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to a model.

    Attributes:
        embedding: path of the input embeddings in whose place the adapter's stand.
        masks: (M, D) embeddings of the mask ids, which follow the vocabulary.
        updates: by the path of the layer that carries it.
    """

    embedding: str
    masks: torch.Tensor
    updates: Mapping[str, LowRank] = field(default_factory=dict)


def fused_groups(model: PreTrainedModel, adapter: Adapter | None, attention: str) -> list[list[str]]:
    """Group the linear layers that fill whole tiles: consecutive layers with the same input form a group.

    Args:
        model: to be called once.
        adapter: that it carries.
        attention: to call it with.
    """
    paths = {module: path for path, module in model.named_modules() if _fills_tiles(module)}
    updates = {} if adapter is None else adapter.updates
    for path in updates:  # the layer that carries an update is called, and calls the one inside
        paths.pop(_base(model, path), None)
        if _fills_tiles(_base(model, path)) and _fits(_base(model, path), updates[path]):
            paths[model.get_submodule(path)] = path
    calls: list[tuple[str, torch.Tensor]] = []
    with ExitStack() as stack:
        for module in paths:

            def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                calls.append((paths[module], inputs[0]))

            stack.callback(module.register_forward_pre_hook(note).remove)
        own, model.config._attn_implementation = model.config._attn_implementation, attention
        try:
            model(input_ids=torch.ones(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
        finally:
            model.config._attn_implementation = own
    if len(calls) > len({path for path, _ in calls}):  # layers that are called twice may have other company each time
        return [[path] for path in dict(calls)]
    groups: list[list[str]] = []
    before = None
    for path, states in calls:
        base = _base(model, path)
        rank = len(updates[path].down) if path in updates else None
        kind = id(states), _has_bias(base), _weight_type(base), rank
        if kind == before:
            groups[-1].append(path)
        else:
            groups.append([path])
        before = kind
    return groups


@contextmanager
def packed_layers(
    model: nn.Module, groups: Sequence[Sequence[str]], adapter: Adapter | None, *, meta: bool = False
) -> Iterator[None]:
    """Replace a model's linear layers by packed ones within the context.

    Args:
        model: whose layers they are.
        groups: of layers, as `fused_groups` found them.
        adapter: that the model carries.
        meta: the layers have shapes, but no weights.
    """
    updates = {} if adapter is None else adapter.updates
    pages = LargePages()
    own = {path: model.get_submodule(path) for path in chain(*groups)}
    for group in groups:
        bases = [_base(model, path) for path in group]
        layers = _PackedLinears(bases, [updates[path] for path in group if path in updates], pages, meta=meta)
        for index, path in enumerate(group):
            model.set_submodule(path, _PackedLinear(layers, index))
    if adapter is not None:
        own[adapter.embedding] = model.get_submodule(adapter.embedding)
        base = cast(nn.Embedding, own[adapter.embedding].base)
        model.set_submodule(adapter.embedding, _MaskedEmbedding(base, adapter.masks))
    try:
        yield
    finally:
        for path, layer in own.items():
            model.set_submodule(path, layer)


class _PackedLinears(nn.Module):
    """Linear layers over one input, their weights in the tiles of `kernels/linear.cpp` or `kernels/quantized.cpp`."""

    def __init__(
        self, linears: Sequence[nn.Linear], updates: Sequence[LowRank], pages: LargePages, *, meta: bool
    ) -> None:
        super().__init__()
        self._type = _weight_type(linears[0])
        if self._type != _PLAIN:
            packed = _one_tensor(linears, pages, meta=meta)
        elif meta:  # memory that is not written to takes no room
            weight, depth = linears[0].weight, _DEPTH[linears[0].weight.dtype]
            tiles = sum(linear.out_features for linear in linears) // LANES
            packed = weight.new_empty(tiles, weight.shape[1] // depth, LANES, depth)
        else:
            packed = _tiles([linear.weight.detach() for linear in linears], pages)
        self.register_buffer("packed", packed)
        biases = [linear.bias.detach() for linear in linears if _has_bias(linear)]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self._ends = [0]
        for linear in linears:
            self._ends.append(self._ends[-1] + linear.out_features)
        self._rank = _filled_up(len(updates[0].down)) if updates else 0
        self.register_buffer("down", _packed_down(updates))
        self.register_buffer("up", _packed_up(updates))
        self.register_buffer("ends", torch.tensor(self._ends[1:]) if updates else None)
        self._done: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def output(self, states: torch.Tensor, index: int) -> torch.Tensor:
        """Return the (..., outputs) of one of the layers; all are computed when the first is asked for."""
        if self._done is None or self._done[0] is not states:
            found = torch.ops.space.packed_linear(
                states.contiguous(),
                self.packed,
                self.bias,
                self._ends[-1],
                self._type,
                self.down,
                self.up,
                self.ends,
                self._rank,
            )
            self._done = (states, [found[..., start:end] for start, end in pairwise(self._ends)])
        output = self._done[1][index]
        if index == len(self._ends) - 2:
            self._done = None
        return output


class _PackedLinear(nn.Module):
    """One of the layers, as a module in the model."""

    def __init__(self, linears: _PackedLinears, index: int) -> None:
        super().__init__()
        if index == 0:
            self.linears = linears
        # not registered twice
        self._linears, self._index = [linears], index

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as nn.Linear names it
        """Return (..., outputs)."""
        return self._linears[0].output(input, self._index)


class _MaskedEmbedding(nn.Module):
    """Input embeddings extended by rows for mask ids, without branching on the ids."""

    def __init__(self, base: nn.Embedding, masks: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("masks", masks.detach())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return (B, S, D) embeddings of (B, S) ids."""
        size = self.base.num_embeddings
        is_mask = input_ids >= size
        text: torch.Tensor = self.base(input_ids.masked_fill(is_mask, 0))
        masks = cast(torch.Tensor, self.masks)[(input_ids - size).clamp(min=0)].to(text.dtype)
        return torch.where(is_mask[..., None], masks, text)


def _base(model: nn.Module, path: str) -> nn.Linear:
    """Return the linear layer at a path, inside what carries an update where one does."""
    module = model.get_submodule(path)
    return cast(nn.Linear, getattr(module, "base_layer", module))


def _weight_type(linear: nn.Linear) -> int:
    return int(linear.weight_type) if isinstance(linear, QuantizedLinear) else _PLAIN


def _has_bias(linear: nn.Linear) -> bool:
    bias: torch.Tensor | None = linear.bias
    return bias is not None


def _tiles(weights: Sequence[torch.Tensor], pages: LargePages) -> torch.Tensor:
    """Return (outputs / 16, width / depth, 16, depth) of (outputs, width) weights of one width and dtype."""
    width, dtype = weights[0].shape[1], weights[0].dtype
    depth = _DEPTH[dtype]
    tiles = pages.empty((sum(map(len, weights)) // LANES, width // depth, LANES, depth), dtype)
    for weight, to in zip(weights, tiles.split([len(weight) // LANES for weight in weights]), strict=True):
        to.copy_(weight.view(-1, LANES, width // depth, depth).transpose(1, 2))
    return tiles


def _one_tensor(linears: Sequence[nn.Linear], pages: LargePages, *, meta: bool) -> torch.Tensor:
    """Return the packed weights of quantised layers as one tensor, of which each layer's own becomes a part."""
    sizes = [linear.weight.numel() for linear in linears]
    if meta:
        return torch.empty(sum(sizes), dtype=torch.uint8)
    packed = pages.empty((sum(sizes),), torch.uint8)
    for linear, part in zip(linears, packed.split(sizes), strict=True):
        part.copy_(linear.weight.detach())
        linear.weight.data = part
    return packed


def _filled_up(size: int) -> int:
    return -(-size // _CHUNK) * _CHUNK


def _packed_down(updates: Sequence[LowRank]) -> torch.Tensor | None:
    """Return (ranks, inputs) of all updates, filled up with zeros to multiples of 32 each, packed in 8 bits."""
    if not updates:
        return None
    down = torch.cat([_padded(down, _filled_up(len(down))) for down, _ in updates])
    return quantize(down, WeightType.Q8_0)


def _packed_up(updates: Sequence[LowRank]) -> torch.Tensor | None:
    """Return (outputs, rank) of all updates, packed in 8 bits."""
    if not updates:
        return None
    return quantize(torch.cat([_padded(up, len(up)) for _, up in updates]), WeightType.Q8_0)


def _padded(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a matrix with zeros behind it: so many rows, columns to the next multiple of 32."""
    return nn.functional.pad(weight, (0, _filled_up(weight.shape[1]) - weight.shape[1], 0, rows - len(weight)))


def _fits(linear: nn.Linear, update: LowRank) -> bool:
    return update.down.shape[1] == linear.in_features and update.up.shape[0] == linear.out_features


def _fills_tiles(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, and no kind of its own, whose sizes fill whole tiles."""
    if isinstance(module, QuantizedLinear):
        return not module.out_features % LANES
    if not isinstance(module, nn.Linear) or module.__class__.__name__ != "Linear" or hasattr(module, "base_layer"):
        return False
    depth = _DEPTH.get(module.weight.dtype)
    return depth is not None and not module.out_features % LANES and not module.in_features % depth

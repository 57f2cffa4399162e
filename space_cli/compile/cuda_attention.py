"""Attention of a step that is captured in a CUDA graph: behind a cache whose length only the device knows.

A graph's shapes and addresses never change, so what does change lies in tensors: the number of committed tokens, and
for every slot of the block its ancestors by depth. The operator appends the block's keys and values to the cache and
attends over its used part.

A row gets the same bits alone, in a chain and in a tree. Keys are taken in tiles of fixed size that begin at fixed
positions of the text, attention within each tile is computed apart, and tiles are combined in the order of the text
(`cuda_kernels`); keys of the block stand in a row's tiles where they would stand in the committed text, whichever slot
of the cache they are in. The model's other layers see rows padded to a fixed number (`cuda`).

On a CPU, and as the oracle of the kernels, `attend_plainly` computes the same in plain PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from space_cli.core.attention import check_arguments

NAME, NOTING = "space_graph", "space_graph_noting"
"""Their names in transformers' attention interface."""


class LayerShape(NamedTuple):
    """An attention layer with what its cache holds."""

    module: nn.Module
    key_heads: int
    width: int
    value_width: int


class BlockTensors(NamedTuple):
    """What the attention must know of the running step.

    Attributes:
        length: (1) int32, L.
        depths: (R) int32, each row's position less the head's; -1 for rows that are not needed, which come last.
        ancestors: (R, R) int32, by row and depth the slot of the row's ancestor there; -1 beyond the row's own depth.
    """

    length: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # the block's tensors say who sees whom
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of a layer that carries `space_states` and `space_block` during the call."""
    check_arguments(kwargs)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    layer = cast(Any, module)
    return torch.ops.space_graph.attend(query, key, value, layer.space_states, *layer.space_block, scaling), None


def note_shapes(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Stand for the attention while shapes are asked for: note a layer and its heads in the list `space_noted`."""
    noted = cast(Any, module).space_noted
    noted.append(LayerShape(module, key.shape[1], key.shape[3], value.shape[3]))
    return query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[3]), None


@torch.library.custom_op("space_graph::attend", mutates_args=("states",))
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    states: torch.Tensor,
    length: torch.Tensor,
    depths: torch.Tensor,
    ancestors: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Append a block's keys and values to a layer's cache and attend over the visible keys.

    Args:
        query: (1, H, R, D).
        key: (1, H_kv, R, D), H a multiple of H_kv.
        value: (1, H_kv, R, D).
        states: (2, H_kv, capacity, D), keys and values held; slots `length` to `length` + R - 1 are written.
        length: as the others, of `BlockTensors`.
        depths: see there.
        ancestors: see there.
        scaling: of the products.

    Returns:
        (1, R, H, D).
    """
    if query.device.type == "cuda":
        from space_cli.compile import cuda_kernels  # needs Triton, which is there where PyTorch has CUDA

        return cuda_kernels.attend(query, key, value, states, BlockTensors(length, depths, ancestors), scaling)
    return attend_plainly(query, key, value, states, BlockTensors(length, depths, ancestors), scaling)


@attend.register_fake
def _attend_shape(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    states: torch.Tensor,
    block: BlockTensors,
    scaling: float,
) -> torch.Tensor:
    """Compute what `attend` does in float32 and plain PyTorch; reads the length off the device."""
    committed, rows = int(block.length), query.shape[2]
    end = committed + rows
    states[0, :, committed:end], states[1, :, committed:end] = key[0], value[0]
    per_group = query.shape[1] // key.shape[1]
    keys, values = (each[:, :end].float().repeat_interleave(per_group, dim=0) for each in states)
    ancestors = block.ancestors.long()
    seen = torch.zeros(rows, rows + 1, dtype=torch.bool, device=query.device)
    # those that are not there are noted in a column of their own
    seen.scatter_(1, torch.where(ancestors < 0, rows, ancestors), torch.ones_like(seen[:, :rows]))
    hidden = torch.cat([torch.zeros(rows, committed, dtype=torch.bool, device=query.device), ~seen[:, :rows]], dim=1)
    scores = (query[0].float() @ keys.transpose(1, 2) * scaling).masked_fill(hidden, -torch.inf)
    output: torch.Tensor = (scores.softmax(dim=-1) @ values).transpose(0, 1)[None].to(query.dtype).contiguous()
    return output


for _name, _function in ((NAME, attention), (NOTING, note_shapes)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)

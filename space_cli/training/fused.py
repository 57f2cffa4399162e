"""Fused low-rank layers for training: no temporary as large as the layer's output.

peft's layer scales and adds the update as tables of their own, forwards and backwards, and casts its input; on a CPU
that takes longer than the products. Here the update is added by the product that makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from space_cli.core.attention import attention_of
from space_cli.models.adapter import SlotGate, adapter_of

TRAINING = "space_training"
"""Name of `training_attention` in transformers' attention interface."""
_TRANSPOSED = "_space_transposed"


def fuse_low_rank_layers(model: PreTrainedModel) -> None:
    """Make calls whose slots are all masks use `LowRankLinear`, in place; other calls and layers are unchanged."""
    embedding = adapter_of(model)
    assert embedding is not None
    module: Any
    for module in embedding.layers:
        if type(module.base_layer) is nn.Linear:
            module.forward = partial(_forward, module, embedding.gate, module.forward)


def _forward(layer: Any, gate: SlotGate, plain: Any, inputs: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    if not gate.only_masks or not torch.is_grad_enabled() or inputs.dtype != base.weight.dtype:
        result: torch.Tensor = plain(inputs)
        return result
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling = layer.scaling["default"]
    return _low_rank_linear(inputs, base.weight, _transposed(base), base.bias, down, up, scaling)


def _transposed(base: nn.Linear) -> torch.Tensor:
    """Return W' contiguous in memory; on a CPU that is read twice as fast as W transposed."""
    if base.weight.device.type != "cpu":
        return base.weight.t()
    held = getattr(base, _TRANSPOSED, None)
    if held is None:
        held = base.weight.detach().t().contiguous()
        setattr(base, _TRANSPOSED, held)
    return held


class LowRankLinear(torch.autograd.Function):
    """`x W' + b + s x A' B'` with a frozen W; gradients flow to x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        transposed: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return (..., out) of (..., in) inputs.

        Args:
            ctx: of autograd.
            inputs: of the base's dtype, as are the products.
            weight: (out, in).
            transposed: the same, (in, out).
            bias: (out).
            down: A, (r, in), float32.
            up: B, (out, r), float32.
            scaling: s.
        """
        flat = inputs.reshape(-1, inputs.shape[-1])
        down, up = down.to(flat.dtype), (up * scaling).to(flat.dtype)
        low = flat @ down.t()
        output = (flat @ transposed if bias is None else torch.addmm(bias, flat, transposed)).addmm_(low, up.t())
        ctx.save_for_backward(flat, low, weight, down, up)
        ctx.scaling = scaling
        return output.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of inputs, A and B."""
        flat, low, weight, down, up = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        through = gradient @ up
        inputs = (gradient @ weight).addmm_(through, down)
        of_down = (through.t() @ flat).float()
        of_up = (gradient.t() @ low).float() * ctx.scaling
        return inputs.view(*gradients[0].shape[:-1], -1), None, None, None, of_down, of_up, None


_low_rank_linear = cast(Callable[..., torch.Tensor], LowRankLinear.apply)  # torch leaves it untyped


def training_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by plain matrix products when a CPU computes gradients; SDPA's backward pass takes twice the time there.

    Shapes as in transformers' attention functions: query (B, H, Q, D), keys (B, H_kv, N, D), an additive mask.
    """
    if attention_mask is None or not torch.is_grad_enabled() or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    grouped = (query * (width**-0.5 if scaling is None else scaling)).reshape(batch, -1, groups * queries, width)
    scores = (grouped @ key.transpose(2, 3)).view(batch, -1, groups, queries, key.shape[2])
    probs = functional.softmax(scores + attention_mask[:, :, None], dim=-1).view(
        batch, -1, groups * queries, key.shape[2]
    )
    return (probs @ value).view(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def training_attention_of(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Use `training_attention` in the model during a call, if its attention can be replaced."""
    return attention_of(model, TRAINING)


AttentionInterface.register(TRAINING, training_attention)
AttentionMaskInterface.register(TRAINING, sdpa_mask)

"""Low-rank layers in one piece for training: no table as large as the layer's output beside the output itself.

peft's layer scales and adds the update as tables of their own, forwards and backwards, and casts its input; on a CPU that
takes longer than the products. Here the update is added by the product that makes it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional


def fuse_low_rank_layers(model: nn.Module) -> None:
    """Make calls in which all slots are masks use `LowRankLinear`, in place; other calls, and other layers, stay."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module.base_layer) is nn.Linear:
            module.forward = partial(_forward, module, module.forward)


def _forward(layer: Any, plain: Any, inputs: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    if layer.disable_adapters or not torch.is_grad_enabled() or inputs.dtype != base.weight.dtype:
        result: torch.Tensor = plain(inputs)
        return result
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    output: torch.Tensor = LowRankLinear.apply(inputs, base.weight, base.bias, down, up, layer.scaling["default"])
    return output


class LowRankLinear(torch.autograd.Function):
    """`x W' + b + s x A' B'` with a frozen W, whose gradient is asked for in x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
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
            bias: (out).
            down: A, (r, in), float32.
            up: B, (out, r), float32.
            scaling: s.
        """
        flat = inputs.reshape(-1, inputs.shape[-1])
        down, up = down.to(flat.dtype), (up * scaling).to(flat.dtype)
        low = flat @ down.t()
        output = functional.linear(flat, weight, bias).addmm_(low, up.t())
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
        return inputs.view(*gradients[0].shape[:-1], -1), None, None, of_down, of_up, None

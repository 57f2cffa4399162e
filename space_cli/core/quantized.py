"""Layers over weights in 4 to 16 bits, as a GGUF file has them, or quantised at load.

Weights are packed into tiles once, when they are loaded, by the C++ kernels (`kernels/quantized.cpp`); plain
modules and compiled models compute with the same tensors. Activations and outputs are float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import cast

import torch
from torch import nn

from space_cli.core.pages import mapped


class WeightType(IntEnum):
    """The types of a GGUF file's weights that have kernels, by ggml's numbers."""

    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


class QuantizedLinear(nn.Linear):
    """A linear layer over packed weights. Its `weight` is a uint8 vector, so nothing can be learned through it.

    Args:
        packed: as `pack` made it.
        weight_type: of the weights in it.
        in_features: inputs of the layer.
        out_features: outputs of the layer.
        bias: (out_features) float32 or None.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        weight_type: WeightType,
        *,
        in_features: int,
        out_features: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight_type = in_features, out_features, weight_type
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as nn.Linear names it
        """Return (..., out_features) float32 of (..., in_features) float32."""
        return cast(
            torch.Tensor,
            torch.ops.space.quantized_linear(
                input.contiguous(), self.weight, self.bias, self.out_features, int(self.weight_type)
            ),
        )

    def dequantized(self) -> nn.Linear:
        """Return the layer with float32 weights."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = unpack(self.weight, self.weight_type, torch.arange(self.out_features), self.in_features)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        """Return what `print` shows of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weight_type={self.weight_type.name}"


class QuantizedEmbedding(nn.Embedding):
    """Input embeddings over packed weights, which the output embeddings may share."""

    def __init__(self, packed: torch.Tensor, weight_type: WeightType, *, num_embeddings: int, width: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.weight_type = num_embeddings, width, weight_type
        self.padding_idx, self.max_norm = None, None
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as nn.Embedding names it
        """Return (..., width) float32 of int64 token ids."""
        return unpack(self.weight, self.weight_type, input, self.embedding_dim)

    def dequantized(self) -> nn.Embedding:
        """Return the layer with float32 weights."""
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        weight = unpack(self.weight, self.weight_type, torch.arange(self.num_embeddings), self.embedding_dim)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        """Return what `print` shows of it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weight_type={self.weight_type.name}"


def has_quantized_layers(model: nn.Module) -> bool:
    """Return whether any layer of a model computes with packed weights."""
    return any(isinstance(module, QuantizedLinear | QuantizedEmbedding) for module in model.modules())


def replace_layer(model: nn.Module, path: str, packed: torch.Tensor, weight_type: WeightType) -> None:
    """Put a quantised layer in the place of a linear layer, whose bias it keeps, or of embeddings.

    Args:
        model: of the layer.
        path: of the layer in the model.
        packed: its weights, a parameter that holds what `pack` made; layers may share it.
        weight_type: of the weights in it.
    """
    module = model.get_submodule(path)
    made: QuantizedLinear | QuantizedEmbedding
    if isinstance(module, nn.Embedding):
        made = QuantizedEmbedding(packed, weight_type, num_embeddings=module.num_embeddings, width=module.embedding_dim)
    else:
        linear = cast(nn.Linear, module)
        made = QuantizedLinear(packed, weight_type, in_features=linear.in_features, out_features=linear.out_features)
        # on the meta device it is still to be filled
        made.bias = linear.bias
    made.weight = cast(nn.Parameter, packed)
    model.set_submodule(path, made)


def num_parameters(model: nn.Module) -> int:
    """Return how many weights a model has, packed ones counted as the numbers they stand for; shared ones once."""
    packed = {
        module.weight.data_ptr(): module.in_features * module.out_features
        if isinstance(module, QuantizedLinear)
        else module.num_embeddings * module.embedding_dim
        for module in model.modules()
        if isinstance(module, _QUANTIZED)
    }
    plain = {id(each): each.numel() for each in model.parameters() if each.dtype != torch.uint8}
    return sum(packed.values()) + sum(plain.values())


def dequantize(model: nn.Module) -> None:
    """Put float32 layers in the place of quantised ones; tied weights stay tied."""
    dense: dict[int, torch.Tensor] = {}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _QUANTIZED)]
    for name, module in layers:
        made = module.dequantized()
        made.register_parameter("weight", cast(nn.Parameter, dense.setdefault(module.weight.data_ptr(), made.weight)))
        model.set_submodule(name, made)


_QUANTIZED = (QuantizedLinear, QuantizedEmbedding)


def pack(blocks: torch.Tensor, weight_type: WeightType, width: int, order: torch.Tensor | None = None) -> torch.Tensor:
    """Return weights in the tiles of `kernels/quantized.cpp`.

    Args:
        blocks: (outputs, bytes of a row) uint8, as the file has them.
        weight_type: of the blocks.
        width: inputs of a row.
        order: (outputs) int64, which of the file's rows each output takes; None takes them as they lie.
    """
    outputs = blocks.shape[0]
    # a compiled model takes a copy, piece by piece
    packed = mapped(_kernels().space_packed_bytes(weight_type, outputs, width))
    at = None if order is None else order.data_ptr()
    _kernels().space_pack(weight_type, blocks.data_ptr(), at, packed.data_ptr(), outputs, width)
    return packed


def quantize(weights: torch.Tensor, weight_type: WeightType) -> torch.Tensor:
    """Round (outputs, width) weights to a type, and return them packed."""
    from gguf import GGMLQuantizationType, quants  # which most runs do without

    blocks = quants.quantize(weights.detach().float().numpy(), GGMLQuantizationType(int(weight_type)))
    return pack(torch.from_numpy(blocks).view(torch.uint8), weight_type, weights.shape[1])


def unpack(packed: torch.Tensor, weight_type: WeightType, ids: torch.Tensor, width: int) -> torch.Tensor:
    """Return float32 rows (..., width) of the weights of outputs `ids` (...) int64."""
    return cast(torch.Tensor, torch.ops.space.quantized_rows(ids.contiguous(), packed, width, int(weight_type)))


_library: list[ctypes.CDLL] = []


def use_kernels(library: ctypes.CDLL) -> None:
    """Compute with this library of our kernels from now on."""
    size, address = ctypes.c_int64, ctypes.c_void_p
    library.space_packed_bytes.argtypes = [size] * 3
    library.space_packed_bytes.restype = size
    library.space_pack.argtypes = [size, *[address] * 3, *[size] * 2]
    library.space_linear_quantized.argtypes = [size, *[address] * 4, *[size] * 3, address]
    library.space_rows_quantized.argtypes = [size, *[address] * 3, *[size] * 2]
    _library[:] = [library]


def _kernels() -> ctypes.CDLL:
    if not _library:
        raise RuntimeError("the kernels of quantised layers are not loaded")
    return _library[0]


def _quantized_linear(
    states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, outputs: int, weight_type: int
) -> torch.Tensor:
    width = states.shape[-1]
    made = states.new_empty(*states.shape[:-1], outputs)
    own_bias = None if bias is None else bias.data_ptr()
    _kernels().space_linear_quantized(
        weight_type,
        states.data_ptr(),
        packed.data_ptr(),
        own_bias,
        made.data_ptr(),
        states.numel() // width,
        width,
        outputs,
        None,
    )
    return made


def _quantized_rows(ids: torch.Tensor, packed: torch.Tensor, width: int, weight_type: int) -> torch.Tensor:
    made = torch.empty(*ids.shape, width)
    _kernels().space_rows_quantized(weight_type, ids.data_ptr(), packed.data_ptr(), made.data_ptr(), ids.numel(), width)
    return made


def _linear_shape(
    states: torch.Tensor, _packed: torch.Tensor, _bias: torch.Tensor | None, outputs: int, _type: int
) -> torch.Tensor:
    return states.new_empty(*states.shape[:-1], outputs)


def _rows_shape(ids: torch.Tensor, _packed: torch.Tensor, width: int, _type: int) -> torch.Tensor:
    return ids.new_empty(*ids.shape, width, dtype=torch.float32)


def _define(schema: str, run: Callable[..., object], shape: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _OPERATORS.define(schema)
    _OPERATORS.impl(name, run, "CPU")
    torch.library.register_fake(f"space::{name}", shape, lib=_OPERATORS)


_OPERATORS = torch.library.Library("space", "FRAGMENT")  # it lives as long as this name
_define(
    "quantized_linear(Tensor input, Tensor packed, Tensor? bias, int outputs, int type) -> Tensor",
    _quantized_linear,
    _linear_shape,
)
_define("quantized_rows(Tensor ids, Tensor packed, int width, int type) -> Tensor", _quantized_rows, _rows_shape)

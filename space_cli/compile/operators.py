"""Our operators as `torch.export` sees them: their shapes, and the C++ functions that compiled models call for them.

`quantized_linear` and `quantized_rows`, which are called without compilation too, are defined in `core.quantized`.
"""

from __future__ import annotations

import torch

from space_cli.core import quantized  # noqa: F401  # defines two of the operators below
from space_cli.core.sampling import TOP_K


def _attention_shape(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: float) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _likely_shape(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], TOP_K)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


def _linear_shape(states: torch.Tensor, _packed: torch.Tensor, _bias: object, outputs: int, *_: object) -> torch.Tensor:
    return states.new_empty(*states.shape[:-1], outputs)


# compiled models call `kernels/shims.cpp` straight; there is nothing to dispatch to
_OPERATORS = torch.library.Library("space", "FRAGMENT")  # it lives as long as this name
_OPERATORS.define("cached_attention(Tensor query, Tensor key, Tensor value, int layer, float scaling) -> Tensor")
_OPERATORS.define("likely(Tensor logits) -> (Tensor, Tensor)")
_OPERATORS.define(
    "packed_linear(Tensor input, Tensor packed, Tensor? bias, int outputs, int type, Tensor? down, Tensor? up, "
    "Tensor? ends, int rank) -> Tensor"
)
torch.library.register_fake("space::cached_attention", _attention_shape, lib=_OPERATORS)
torch.library.register_fake("space::likely", _likely_shape, lib=_OPERATORS)
torch.library.register_fake("space::packed_linear", _linear_shape, lib=_OPERATORS)
SHIMS = {
    torch.ops.space.cached_attention.default: [
        "AOTITorchError aoti_torch_cpu_cached_attention(AtenTensorHandle query, AtenTensorHandle key, "
        "AtenTensorHandle value, int64_t layer, double scaling, AtenTensorHandle* made)"
    ],
    torch.ops.space.likely.default: [
        "AOTITorchError aoti_torch_cpu_likely(AtenTensorHandle logits, AtenTensorHandle* tokens, "
        "AtenTensorHandle* shares)"
    ],
    torch.ops.space.packed_linear.default: [
        "AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle input, AtenTensorHandle packed, "
        "AtenTensorHandle* bias, int64_t outputs, int64_t type, AtenTensorHandle* down, AtenTensorHandle* up, "
        "AtenTensorHandle* ends, int64_t rank, AtenTensorHandle* made)"
    ],
    torch.ops.space.quantized_linear.default: [
        "AOTITorchError aoti_torch_cpu_quantized_linear(AtenTensorHandle input, AtenTensorHandle packed, "
        "AtenTensorHandle* bias, int64_t outputs, int64_t type, AtenTensorHandle* made)"
    ],
    torch.ops.space.quantized_rows.default: [
        "AOTITorchError aoti_torch_cpu_quantized_rows(AtenTensorHandle ids, AtenTensorHandle packed, int64_t width, "
        "int64_t type, AtenTensorHandle* made)"
    ],
}

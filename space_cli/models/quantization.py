"""Low-bit weights made of a float checkpoint when it is loaded.

Either by bitsandbytes, inside transformers, or as GGUF files have them: rounded by the `gguf` package, layer by layer,
and computed with by our kernels on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from space_cli.core.quantized import QuantizedEmbedding, WeightType, num_parameters, quantize, replace_layer
from space_cli.errors import UsageProblem
from space_cli.models.kernels import kernels_problem

PACKED = {"q8_0": WeightType.Q8_0, "q4_0": WeightType.Q4_0}
"""Quantisations computed by our kernels, and the type of linear layers in each."""
# as llama.cpp, which takes 6 bits there, 8 where rows are no whole blocks of these; `gguf` makes no blocks of 6 bits.
# SmolLM2 in q4_0: perplexity 29.0, with output embeddings in 4 bits too 32.0; 24.4 in float32
_OUTPUT = WeightType.Q8_0
_BLOCK = 32


def bitsandbytes_arguments(quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for bitsandbytes weights, none for `none`.

    Raises:
        UsageProblem: bitsandbytes is not installed, or no quantisation has this name.
    """
    if quantization == "none":
        return {}
    if quantization not in ("int8", "nf4", "fp4"):
        known = ", ".join(("none", *PACKED, "int8", "nf4"))
        raise UsageProblem(f"unknown quantization {quantization!r}", hint=f"use {known} or fp4")
    if find_spec("bitsandbytes") is None:
        raise UsageProblem(
            f"--quantization {quantization} needs bitsandbytes", hint="pip install 'space-decoding[quantization]'"
        )
    if quantization == "int8":
        # with its outlier columns, chosen over all rows of a call, a row's result would depend on the rows beside it
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config}


def check_packing(name: str, config: PretrainedConfig, quantization: str, *, device: str, dtype: str) -> None:
    """Refuse to pack the weights of a model before they are read.

    Raises:
        UsageProblem: they are quantised already, are to run elsewhere than on a CPU or in another dtype than float32,
            or there is no C++ compiler.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UsageProblem(f"{name}: its weights are quantised as they are", hint="leave --quantization out")
    if device != "cpu":
        raise UsageProblem(
            f"--quantization {quantization} computes on a CPU, not on {device}",
            hint="give --device cpu, or int8 or nf4",
        )
    if dtype not in ("auto", "float32"):
        raise UsageProblem(
            f"--quantization {quantization} computes in float32, not in {dtype}", hint="leave --dtype out"
        )
    problem = kernels_problem()
    if problem is not None:
        raise UsageProblem(f"--quantization {quantization} needs kernels that cannot be built: {problem}")


def pack_layers(model: PreTrainedModel, quantization: str, name: str) -> None:
    """Put packed layers in the place of linear layers and token embeddings, one by one; what is left becomes float32.

    Args:
        model: on a CPU, in the dtype of its checkpoint: its weights are then the mapped file, and rounding a layer
            takes memory for that layer alone.
        quantization: of `PACKED`.
        name: of the model, for errors.

    Raises:
        UsageProblem: most of its weights are in other layers, as experts are.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = output is not None and output.weight is embedding.weight
    # of classes of their own there may be more to a layer than a product or a row
    paths = [
        path
        for path, each in model.named_modules()
        if type(each) is nn.Linear or (each is embedding and type(each) is nn.Embedding)
    ]
    _check_share(model, paths, quantization, name)
    for path in paths:
        layer = cast("nn.Linear | nn.Embedding", model.get_submodule(path))
        own = model.get_input_embeddings()
        if layer is output and is_tied and isinstance(own, QuantizedEmbedding):
            replace_layer(model, path, own.weight, own.weight_type)
        else:
            is_output = layer is output or (layer is embedding and is_tied)
            _pack_layer(model, path, layer, _OUTPUT if is_output else PACKED[quantization])
    _widen(model)


def _check_share(model: PreTrainedModel, paths: Sequence[str], quantization: str, name: str) -> None:
    """Refuse a model whose weights would mostly stay as they are."""
    held = {
        id(weight): weight.numel()
        for weight in (cast(torch.Tensor, model.get_submodule(path).weight) for path in paths)
    }
    share = sum(held.values()) / num_parameters(model)
    if share < 0.5:
        raise UsageProblem(
            f"{name}: --quantization {quantization} packs linear layers, which hold only {share:.0%} of its weights",
            hint="leave it out",
        )


def _pack_layer(model: PreTrainedModel, path: str, layer: nn.Linear | nn.Embedding, weight_type: WeightType) -> None:
    """Put a packed layer in the place of another."""
    width = layer.weight.shape[1]
    # as llama.cpp does
    weight_type = WeightType.F16 if width % _BLOCK else weight_type
    packed = nn.Parameter(quantize(layer.weight, weight_type), requires_grad=False)
    replace_layer(model, path, packed, weight_type)


def _widen(model: PreTrainedModel) -> None:
    """Turn all that is not packed into float32, held apart from the checkpoint's file."""
    for parameter in model.parameters():
        if parameter.dtype != torch.uint8:
            parameter.data = parameter.data.to(torch.float32, copy=True)
    # buffers that no checkpoint has were computed in its dtype
    with init_empty_weights(include_buffers=False):
        computed = dict(AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).named_buffers())
    stored = model.state_dict().keys()
    for path, buffer in list(model.named_buffers()):
        parent, _, leaf = path.rpartition(".")
        kept = buffer.float() if buffer.is_floating_point() else buffer
        setattr(model.get_submodule(parent), leaf, kept if path in stored else computed[path])
    model.config.dtype = torch.float32

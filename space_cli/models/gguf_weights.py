"""Weights of a GGUF file: quantised layers over the file's own blocks, everything else as float32 tensors.

Names, and what llama.cpp changed about a tensor, are transformers' knowledge (`modeling_gguf_pytorch_utils`). A matrix
stays quantised where all that was changed is the order of its rows; others are unpacked.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from space_cli.core.quantized import QuantizedEmbedding, WeightType, pack, replace_layer
from space_cli.errors import UsageProblem
from space_cli.models.gguf_dense import processor_of, tensor_names, unpacked
from space_cli.models.gguf_file import GgufFile, Tensor


@dataclass(frozen=True)
class _Matrix:
    """A tensor of the file with its place in the model.

    Attributes:
        name: of the model's parameter.
        order: (outputs) int64, the file's row of each output; None where they lie as they should.
    """

    tensor: Tensor
    name: str
    order: torch.Tensor | None


def load_packed(gguf: GgufFile, config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of a GGUF file in float32, its matrices quantised as they are in the file.

    Raises:
        UsageProblem: weights are absent or of another shape than the metadata say.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names, processor = tensor_names(gguf, config, model.state_dict()), processor_of(gguf, config)
    merged: dict[str, torch.Tensor] = {}
    for tensor in gguf.tensors:
        matrix = _matrix(model, tensor, names, processor)
        if matrix is not None:
            _fill_quantized(model, matrix)
            continue
        # experts are put together by the processor, into `merged`
        done = processor.process(
            weights=unpacked(tensor), name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": merged}
        )
        if done.name in names:
            _fill(model, gguf, names[done.name], torch.from_numpy(np.array(done.weights, dtype=np.float32)))
    for name, weights in merged.items():
        _fill(model, gguf, name, weights.float())
    _tie(model)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise UsageProblem(f"{gguf.files[0]}: is damaged: it has no weights for {absent[0]}")
    model.eval()
    return model


def _fill(model: PreTrainedModel, gguf: GgufFile, name: str, value: torch.Tensor) -> None:
    """Set the unquantised weights."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    expected: torch.Tensor = getattr(module, leaf)
    if expected.shape != value.shape:
        raise UsageProblem(f"{gguf.files[0]}: is damaged: the weights for {name} have another shape")
    is_parameter = isinstance(expected, nn.Parameter)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def _matrix(model: PreTrainedModel, tensor: Tensor, names: dict[str, str], processor: Any) -> _Matrix | None:
    """Return a matrix that can stay packed, or None."""
    name = names.get(tensor.name)
    if name is None or tensor.type not in WeightType.__members__ or len(tensor.shape) != 2:
        return None
    module = model.get_submodule(name.rpartition(".")[0])
    if type(module) not in (nn.Linear, nn.Embedding) or not name.endswith(".weight"):
        return None
    outputs, width = tensor.shape
    if tuple(cast(torch.Tensor, module.weight).shape) != (outputs, width) or width % 32:
        return None
    # run the processor on row indices to see whether it only permutes rows
    numbers = np.arange(2 * outputs, dtype=np.int64).reshape(outputs, 2)
    try:
        done = processor.process(weights=numbers, name=tensor.name, tensor_key_mapping=names, parsed_parameters={})
    except (ValueError, KeyError, IndexError):  # it is not rows alone that are moved
        return None
    moved = np.asarray(done.weights)
    if done.name != tensor.name or moved.shape != numbers.shape or not np.array_equal(moved[:, 0] + 1, moved[:, 1]):
        return None
    order = moved[:, 0] // 2
    if not np.array_equal(np.sort(order), np.arange(outputs)):
        return None
    is_same = np.array_equal(order, np.arange(outputs))
    return _Matrix(tensor, name, None if is_same else torch.from_numpy(np.ascontiguousarray(order)))


def _fill_quantized(model: PreTrainedModel, matrix: _Matrix) -> None:
    """Replace a layer by a quantised one with the weights of a matrix."""
    path, tensor = matrix.name.removesuffix(".weight"), matrix.tensor
    weight_type, (outputs, width) = WeightType[tensor.type], tensor.shape
    raw = np.memmap(
        tensor.file, mode="r", dtype=np.uint8, offset=tensor.offset, shape=(outputs, tensor.num_bytes // outputs)
    )
    with warnings.catch_warnings(action="ignore"):  # torch warns that it could be written to
        blocks = torch.from_numpy(raw)
    packed = pack(blocks, weight_type, width, matrix.order)
    # what was read of the file is needed no more
    raw._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    replace_layer(model, path, nn.Parameter(packed, requires_grad=False), weight_type)


def _tie(model: PreTrainedModel) -> None:
    """Tie output embeddings to the input embeddings if the file has none."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or not cast(torch.Tensor, output.weight).is_meta:
        return
    if isinstance(embedding, QuantizedEmbedding):
        replace_layer(model, next(_paths(model, output)), embedding.weight, embedding.weight_type)
    else:
        model.tie_weights()


def _paths(model: nn.Module, wanted: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if module is wanted)

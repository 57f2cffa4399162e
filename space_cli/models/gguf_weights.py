"""Weights of a GGUF file: quantised layers over the file's own blocks, everything else as float32 tensors.

Names, and what llama.cpp changed about a tensor, are transformers' knowledge (`modeling_gguf_pytorch_utils`). A matrix
stays quantised where all that was changed is the order of its rows; others are unpacked.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from space_cli.core.quantized import QuantizedEmbedding, QuantizedLinear, WeightType, pack
from space_cli.errors import UsageProblem

_LONG = 64


class TensorReader(GGUFReader):  # type: ignore[misc]  # gguf has no types
    """Reads a file's tensors and short fields; a vocabulary's arrays, which take seconds, are stepped over."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type == GGUFValueType.ARRAY:
            kind = GGUFValueType(self._get(orig_offs, np.uint32)[0])
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            if count > _LONG and kind != GGUFValueType.ARRAY:
                end = self._end_of_array(orig_offs + 12, kind, count)
                return end - orig_offs, [self._get(orig_offs, np.uint8, end - orig_offs)], [0], [raw_type, kind]
        found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
        return found

    def _end_of_array(self, start: int, kind: GGUFValueType, count: int) -> int:
        if kind != GGUFValueType.STRING:
            return start + count * int(np.dtype(self.gguf_scalar_to_np[kind]).itemsize)
        order = "little" if self.byte_order == "I" else "big"
        held = memoryview(self.data)
        for _ in range(count):
            start += 8 + int.from_bytes(held[start : start + 8], order)
        return start

    def forget(self) -> None:
        """Give back the memory that holds what was read of the file."""
        self.data._mmap.madvise(mmap.MADV_DONTNEED)


class _NamesOf:
    """What transformers' map of names asks of a model, its base model the only part: it walks all, 30 ms a part."""

    def __init__(self, model: nn.Module, part: str | None = None) -> None:
        self.config, self.state_dict = model.config, model.state_dict
        self._parts = [] if part is None else [(part, _NamesOf(model.get_submodule(part)))]

    def named_children(self) -> list[tuple[str, _NamesOf]]:
        """Return the parts to look into."""
        return self._parts


@dataclass(frozen=True)
class _Matrix:
    """A tensor of the file with its place in the model.

    Attributes:
        name: of the model's parameter.
        order: (outputs) int64, the file's row of each output; None where they lie as they should.
    """

    tensor: ReaderTensor
    name: str
    order: torch.Tensor | None


def load_gguf_model(
    files: list[Path], config: PretrainedConfig, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the model of a GGUF file (or its shards) in float32, its matrices quantised as they are in the file.

    Args:
        files: the shards in order, or the one file.
        config: as transformers reads it from the first.
        dtype: of what is not quantised; float32 is what the kernels compute in.

    Raises:
        UsageProblem: the file lacks weights that the model needs.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    readers = [TensorReader(file) for file in files]
    architecture = str(readers[0].fields["general.architecture"].contents())
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(_NamesOf(model, model.base_model_prefix), processor)
    for reader in readers:
        for tensor in reader.tensors:
            _fill(model, tensor, names, processor)
        reader.forget()
    _tie(model)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise UsageProblem(f"{files[0]}: no weights for {absent[0]}")
    return model.eval()


def _fill(model: PreTrainedModel, tensor: ReaderTensor, names: dict[str, str], processor: TensorProcessor) -> None:
    """Put a tensor of the file into the model."""
    matrix = _matrix(model, tensor, names, processor)
    if matrix is not None:
        _fill_quantized(model, matrix)
        return
    result = processor.process(
        weights=dequantize(tensor.data, tensor.tensor_type),
        name=tensor.name,
        tensor_key_mapping=names,
        parsed_parameters={"tensors": {}},
    )
    name = names.get(result.name or "")
    if name is None:
        return
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    expected = getattr(module, leaf)
    value = torch.from_numpy(np.array(result.weights, dtype=np.float32)).reshape(expected.shape).to(expected.dtype)
    if isinstance(expected, nn.Parameter):
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    else:
        setattr(module, leaf, value)


def _matrix(
    model: PreTrainedModel, tensor: ReaderTensor, names: dict[str, str], processor: TensorProcessor
) -> _Matrix | None:
    """Return what can stay as it is in the file, or None."""
    name = names.get(tensor.name)
    if name is None or tensor.tensor_type not in set(WeightType) or len(tensor.shape) != 2:
        return None
    module = model.get_submodule(name.rpartition(".")[0])
    if type(module) not in (nn.Linear, nn.Embedding) or not name.endswith(".weight"):
        return None
    width, outputs = (int(size) for size in tensor.shape)
    if tuple(cast(torch.Tensor, module.weight).shape) != (outputs, width) or width % 32:
        return None
    # numbers in the places of weights tell what is done to them
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
    path = matrix.name.removesuffix(".weight")
    module = model.get_submodule(path)
    weight_type, (width, outputs) = WeightType(matrix.tensor.tensor_type), map(int, matrix.tensor.shape)
    raw = np.asarray(matrix.tensor.data)
    raw.flags.writeable = False
    blocks = _as_tensor(raw.view(np.uint8).reshape(outputs, -1))
    packed = pack(blocks, weight_type, width, matrix.order)
    made: nn.Module
    if isinstance(module, nn.Embedding):
        made = QuantizedEmbedding(packed, weight_type, num_embeddings=outputs, width=width)
    else:
        # a bias that is still to come keeps its place
        linear = cast(nn.Linear, module)
        made = QuantizedLinear(packed, weight_type, in_features=width, out_features=outputs)
        made.bias = linear.bias
    model.set_submodule(path, made)


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over the file's memory, which nothing writes to."""
    import warnings

    with warnings.catch_warnings(action="ignore"):  # torch warns that it could be written to
        return torch.from_numpy(array)


def _tie(model: PreTrainedModel) -> None:
    """Give output embeddings that the file does not have the input embeddings' weights."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or not cast(torch.Tensor, output.weight).is_meta:
        return
    if isinstance(embedding, QuantizedEmbedding):
        tied = QuantizedLinear(
            embedding.weight,
            embedding.weight_type,
            in_features=embedding.embedding_dim,
            out_features=embedding.num_embeddings,
        )
        tied.weight = embedding.weight
        model.set_submodule(next(_paths(model, output)), tied)
    else:
        model.tie_weights()


def _paths(model: nn.Module, wanted: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if module is wanted)

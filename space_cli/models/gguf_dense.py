"""The weights of a GGUF file under transformers' names, dequantised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import gguf as ggml
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from space_cli.errors import UsageProblem
from space_cli.models.gguf_file import GgufFile, Tensor


def load_dense(gguf: GgufFile, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with all weights in one dtype, on the CPU.

    Raises:
        UsageProblem: weights are absent or of another shape than the metadata say.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    # a plain dict: what is taken out must not be held twice
    state = _state(gguf, config, expected, dtype)
    tied = set(getattr(empty, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    for name, shape in expected.items():
        if name not in state and name not in tied:
            raise UsageProblem(f"{gguf.files[0]}: is damaged: it has no weights for {name}")
        if name in state and tuple(state[name].shape) != shape:
            raise UsageProblem(f"{gguf.files[0]}: is damaged: the weights for {name} have another shape")
    return cast(PreTrainedModel, type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype))


def tensor_names(gguf: GgufFile, config: PretrainedConfig, expected: Iterable[str]) -> dict[str, str]:
    """Return transformers' names of weights by those in the file."""
    kinds = {name: kind for kind, name in ggml.MODEL_ARCH_NAMES.items()}
    table = ggml.get_tensor_name_map(kinds[gguf.architecture], config.num_hidden_layers)
    processor = processor_of(gguf, config)
    names: dict[str, str] = {}
    for ours in expected:
        name = processor.preprocess_name(ours)
        module, dot, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            module, dot, kind = name, "", ""
        theirs = table.get_name(module)
        if theirs is None:
            processor.perform_fallback_tensor_mapping(names, dot + kind, "", name)
        else:
            names[theirs + dot + kind] = ours
    return names


def processor_of(gguf: GgufFile, config: PretrainedConfig) -> Any:
    """Return the processor that reverts llama.cpp's tensor conversions."""
    kind: Any = TENSOR_PROCESSORS.get(gguf.architecture, TensorProcessor)
    return kind(config=config.to_dict())


def _state(
    gguf: GgufFile, config: PretrainedConfig, expected: Iterable[str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the weights by transformers' names."""
    names, processor = tensor_names(gguf, config, expected), processor_of(gguf, config)
    state: dict[str, torch.Tensor] = {}
    for tensor in gguf.tensors:
        # experts are put together by the processor, into `state` itself
        done = processor.process(
            weights=unpacked(tensor),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"tensors": state},
        )
        if done.name in names:
            state[names[done.name]] = torch.from_numpy(np.ascontiguousarray(done.weights)).to(dtype)
    return {name: weights.to(dtype) for name, weights in state.items()}


def unpacked(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the weights of a tensor in float32, rows first."""
    raw = np.memmap(tensor.file, mode="r", dtype=np.uint8, offset=tensor.offset, shape=(tensor.num_bytes,))
    kind = ggml.GGMLQuantizationType[tensor.type]
    rows = raw.reshape(*tensor.shape[:-1], -1)
    # a copy: what is read through the map would change with the file
    return np.array(ggml.dequantize(rows, kind), dtype=np.float32).reshape(tensor.shape)

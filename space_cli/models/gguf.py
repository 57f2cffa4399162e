"""A model from a GGUF file: configuration, tokenizer and weights out of the file alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from space_cli.errors import UsageProblem
from space_cli.models.gguf_dense import load_dense, unpacked
from space_cli.models.gguf_file import GgufFile
from space_cli.models.gguf_tokenizer import end_ids
from space_cli.models.gguf_weights import load_packed

_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "falcon": "falcon",
    "gpt2": "gpt2",
    "nemotron": "nemotron",
}
"""Architectures, by llama.cpp's names, and transformers' names for them."""
# files of Llama 3.1 and later say only by how much each frequency is divided; all are made with these
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gguf_config(gguf: GgufFile) -> PretrainedConfig:
    """Return the configuration that the metadata describe.

    Raises:
        UsageProblem: an architecture that is not supported, or a scaling of positions that is not.
    """
    where, architecture = gguf.files[0], gguf.architecture
    if architecture not in _MODEL_TYPES:
        raise UsageProblem(
            f"{where}: its architecture {architecture!r} is not supported",
            hint=f"supported: {', '.join(sorted(_MODEL_TYPES))}",
        )
    model_type = _MODEL_TYPES[architecture]
    table = model_type.removesuffix("_text")
    names: dict[str, str | None] = GGUF_CONFIG_MAPPING[table]  # type: ignore[assignment]
    values: dict[str, Any] = dict(GGUF_CONFIG_DEFAULTS_MAPPING.get(table, {}))
    values |= {ours: gguf.own(key) for key, ours in names.items() if ours is not None and gguf.own(key) is not None}
    for role in ("bos", "eos", "padding"):
        number = gguf.metadata.get(f"tokenizer.ggml.{role}_token_id")
        values[f"{'pad' if role == 'padding' else role}_token_id"] = number
    tensors = {tensor.name for tensor in gguf.tensors}
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values.setdefault("vocab_size", next((t.shape[0] for t in gguf.tensors if t.name == "token_embd.weight"), None))
    if architecture == "stablelm":
        values["use_qkv_bias"] = "blk.0.attn_q.bias" in tensors
        values["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in tensors
    divisors = _divisors(gguf)
    if scaling := _scaling(gguf) if divisors is None else _LLAMA3 | {"factor": float(divisors.max())}:
        values["rope_scaling"] = scaling
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageProblem(f"{where}: is damaged: its metadata make no {architecture} model: {error}") from error
    if divisors is not None and not _divides_by(divisors, config):
        raise _unknown_divisors(gguf)
    return config


def _divisors(gguf: GgufFile) -> torch.Tensor | None:
    """Return the (dimensions / 2) by which the file divides the rotary frequencies, or None.

    Raises:
        UsageProblem: it divides them by others in long contexts than in short ones.
    """
    found = [tensor for tensor in gguf.tensors if tensor.name.startswith("rope_f")]
    if not found:
        return None
    if gguf.architecture != "llama" or [tensor.name for tensor in found] != ["rope_freqs.weight"]:
        raise _unknown_divisors(gguf)
    divisors = torch.from_numpy(unpacked(found[0])).flatten()
    return None if (divisors == 1).all() else divisors


def _divides_by(divisors: torch.Tensor, config: PretrainedConfig) -> bool:
    """Return whether the rotary frequencies of a config are the plain ones divided so.

    Else they could not be told in a config, and a model trained from the file would lose them.
    """
    size = 2 * len(divisors)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    return scaled.shape == plain.shape and torch.allclose(plain / scaled, divisors, rtol=1e-4)


def _unknown_divisors(gguf: GgufFile) -> UsageProblem:
    return UsageProblem(
        f"{gguf.files[0]}: scales each rotary frequency by a factor of its own, other than those of Llama 3.1",
        hint="take the model in its original format",
    )


def _scaling(gguf: GgufFile) -> dict[str, Any] | None:
    """Return transformers' rope parameters."""
    kind, factor = gguf.own("rope.scaling.type"), gguf.own("rope.scaling.factor")
    if kind in (None, "none") or factor in (None, 0, 1):
        return None
    original = gguf.own("rope.scaling.original_context_length")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UsageProblem(
        f"{gguf.files[0]}: its scaling of positions {kind!r} is not supported", hint="linear and yarn are"
    )


def gguf_dtype(gguf: GgufFile) -> str:
    """Return the dtype of the weights in the file; float32 for quantised ones."""
    types = {tensor.type for tensor in gguf.tensors}
    if types <= {"F32", "BF16"} and "BF16" in types:
        return "bfloat16"
    return "float16" if types <= {"F32", "F16"} and "F16" in types else "float32"


def gguf_model(gguf: GgufFile, config: PretrainedConfig, dtype: torch.dtype, *, packed: bool) -> PreTrainedModel:
    """Return the model with its weights, on the CPU; packed weights keep the file's bits.

    Raises:
        UsageProblem: weights are absent.
    """
    model = load_packed(gguf, config) if packed else load_dense(gguf, config, dtype)
    generation = model.generation_config
    generation.eos_token_id = sorted(end_ids(gguf.metadata)) or None
    return model

"""llama.cpp as a peer: decodes the GGUF file a model was loaded from, or a file it is converted to.

Tokens are known by their ids alone, so what is written has no vocabulary. `llama_cpp` is no dependency of
ours: it is imported by name, late, so that mypy finds the same with and without it.

Source: llama.cpp's `convert_hf_to_gguf.py` (`LlamaModel`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from platformdirs import user_cache_path
from transformers import PreTrainedModel

from space_cli.compile.export import unsupported_reason
from space_cli.compile.fingerprint import fingerprint, weights_digest
from space_cli.core.quantized import QuantizedEmbedding, QuantizedLinear, WeightType, has_quantized_layers
from space_cli.core.sampling import Sampling
from space_cli.errors import RunFailed, UsageProblem, writing
from space_cli.models.gguf_file import read_gguf
from space_cli.models.loading import LoadedModel

_FILE_VERSION = 1
"""Version of what is written into the files, which outlive this version of the package."""
_MIN_CONTEXT = 1024
# scaled by a factor of each frequency, which a file can hold
_ROPE_TYPES = ("default", "linear", "llama3")
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_running: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, Any]] = weakref.WeakKeyDictionary()


def check(loaded: LoadedModel, sampling: Sampling) -> None:
    """Refuse models and sampling that llama.cpp cannot be compared on.

    Raises:
        UsageProblem: its package is not installed, another architecture than Llama's, or not greedy.
    """
    if find_spec("llama_cpp") is None:
        raise UsageProblem("method 'llama-cpp' needs another package", hint="pip install llama-cpp-python")
    if sampling.temperature or sampling.repetition_penalty != 1:
        raise UsageProblem(
            "method 'llama-cpp' is greedy, without repetition penalty",
            hint="leave out --temperature and --repetition-penalty",
        )
    reason = None if loaded.gguf is not None else _unsupported_reason(loaded.model)
    if reason is not None:
        raise UsageProblem(f"method 'llama-cpp' cannot run {loaded.name}: {reason}", hint="leave it out of --methods")


def _unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return why a model cannot be converted, or None if it can."""
    if type(model).__name__ != "LlamaForCausalLM":
        return f"it is a {type(model).__name__}, and LlamaForCausalLM alone can be converted"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}"
    if model.config.rope_parameters["rope_type"] not in _ROPE_TYPES:
        return f"its rotary positions are scaled by {model.config.rope_parameters['rope_type']}"
    return unsupported_reason(model)


def greedy(loaded: LoadedModel, prompt_ids: Sequence[int], sampling: Sampling, *, max_new_tokens: int) -> Iterator[int]:
    """Return the tokens that llama.cpp generates, without end; loading and converting the model is done on return.

    Raises:
        RunFailed: the file cannot be written, or llama.cpp does not run it.
    """
    llama = _runner(loaded, len(prompt_ids) + max_new_tokens)
    # otherwise it would reuse the prefix shared with the previous prompt
    llama.reset()
    tokens: Iterator[int] = llama.generate(
        list(prompt_ids),
        temp=0.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )
    return tokens


def _runner(loaded: LoadedModel, length: int) -> Any:
    """Return llama.cpp with the model loaded and a context of at least `length` tokens; cached per model."""
    model = loaded.model
    context, llama = _running.get(model, (0, None))
    if context < length:
        context = max(_MIN_CONTEXT, 1 << (length - 1).bit_length())
        package = import_module("llama_cpp")
        # its defaults, a float16 cache and flash attention, are fastest, but round to half precision: logits of float32
        # weights are off by 2 % of their spread with them, by 0.001 % without; to blocks of 4 bits it makes no odds
        low_bit = has_quantized_layers(model) or (loaded.gguf is not None and read_gguf(loaded.gguf).is_quantized)
        half = model.dtype != torch.float32 or low_bit
        cache_type = None if half else package.GGML_TYPE_F32
        file = loaded.gguf if loaded.gguf is not None else _file(model)
        try:
            with _without_amx(package):
                llama = package.Llama(
                    str(file),
                    n_ctx=context,
                    # penalties count the whole answer, not its last 64 tokens
                    last_n_tokens_size=context,
                    n_threads=torch.get_num_threads(),
                    n_threads_batch=torch.get_num_threads(),
                    flash_attn=half,
                    type_k=cache_type,
                    type_v=cache_type,
                    verbose=False,
                )
        except ValueError as error:
            raise RunFailed(f"llama.cpp cannot run {file}: {error}", hint="leave llama-cpp out of --methods") from error
        # at interpreter shutdown it would be too late
        weakref.finalize(model, llama.close)
        next(llama.generate([0], temp=0.0))
        _running[model] = context, llama
    return llama


@contextmanager
def _without_amx(package: Any) -> Iterator[None]:
    """Keep llama.cpp from AMX, whose kernels end the process in version 0.3.36 of its bindings on a Q4_1 file."""
    made = package.llama_cpp.llama_model_default_params

    def without() -> Any:
        parameters = made()
        parameters.use_extra_bufts = False
        return parameters

    has_amx = torch.cpu._is_amx_tile_supported()
    package.llama_cpp.llama_model_default_params = without if has_amx else made
    try:
        yield
    finally:
        package.llama_cpp.llama_model_default_params = made


def _file(model: PreTrainedModel) -> Path:
    """Return the GGUF file of these weights; convert them if there is none yet."""
    file = user_cache_path("space") / "gguf" / f"{fingerprint(model)[:8]}-{weights_digest(model)}-{_FILE_VERSION}.gguf"
    if file.exists():
        return file
    with writing(file):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent, suffix=".unfinished", delete=False) as stream:
            unfinished = Path(stream.name)
        try:
            convert(model, unfinished)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    return file


def convert(model: PreTrainedModel, file: Path) -> None:
    """Write a Llama as a GGUF file without vocabulary: matrices as the model has them, vectors in float32."""
    gguf = import_module("gguf")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, tensor, weight_type in _tensors(model):
        if weight_type is not None:
            # rounding what was rounded before gives the same bits
            kind = gguf.GGMLQuantizationType(int(weight_type))
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        elif tensor.ndim == 1 or tensor.dtype == torch.float32:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor, WeightType | None]]:
    """Yield the weights under llama.cpp's names, in its order of rotary dimensions, and the type of packed ones."""
    config = model.config
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue  # llama.cpp takes token_embd where there is no output
        owner, weight_type = model.get_submodule(module), None
        if kind == "weight" and isinstance(owner, QuantizedLinear | QuantizedEmbedding):
            tensor, weight_type = owner.dequantized().weight.detach(), owner.weight_type
        if module in _OUTSIDE:
            yield f"{_OUTSIDE[module]}.{kind}", tensor, weight_type
        else:
            _, _, layer, part = module.split(".", 3)
            placed = _interleaved(tensor, heads[part]) if part in heads else tensor
            yield f"blk.{layer}.{_IN_LAYER[part]}.{kind}", placed, weight_type
    if config.rope_parameters["rope_type"] != "default":
        scaled = model.model.rotary_emb.inv_freq.float()
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        yield "rope_freqs.weight", config.rope_parameters["rope_theta"] ** -exponents / scaled, None


def _interleaved(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of each head for llama.cpp, which rotates neighbours where transformers rotates halves."""
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)

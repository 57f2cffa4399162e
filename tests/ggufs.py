"""GGUF files for tests, written by the `gguf` package."""

import json

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def byte_level(writer, tokenizer, *, pre="gpt-2", control=(), user_defined=()):
    """Give a file the vocabulary of a `tokenizers.Tokenizer`."""
    definition = json.loads(tokenizer.to_str())
    vocabulary = definition["model"]["vocab"] | {token["content"]: token["id"] for token in definition["added_tokens"]}
    for token in (*control, *user_defined):
        vocabulary.setdefault(token, len(vocabulary))
    tokens = sorted(vocabulary, key=vocabulary.get)
    marked = {token["content"] for token in definition["added_tokens"]} | set(control)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [CONTROL if token in marked else USER_DEFINED if token in user_defined else NORMAL for token in tokens]
    )
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in definition["model"]["merges"]]
    )
    return tokens


def sentencepiece(writer, words):
    """Give a file a SentencePiece vocabulary: bytes, and words with scores by their place."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(place) for place in range(len(words))])
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words))
    return tokens


def finish(writer):
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary_file(file, describe):
    """Write a file with a vocabulary and next to no weights."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    describe(writer)
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    finish(writer)
    return file


def llama_file(
    file,
    model,
    tokenizer,
    *,
    kind="F32",
    output_kind=None,
    architecture="llama",
    template=None,
    divisors=None,
    **written,
):
    """Write a Llama with its vocabulary, its matrices in one type.

    Args:
        file: to write.
        model: a `LlamaForCausalLM`.
        tokenizer: a fast tokenizer of transformers with byte-level BPE.
        kind: of matrices, as ggml names it.
        output_kind: of output embeddings, and of input embeddings tied to them, where it is another.
        architecture: said of it.
        template: of chats.
        divisors: float32 by which each rotary frequency is divided, as files of Llama 3.1 have them.
        written: other values of metadata, by key with _ for a dot.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    byte_level(writer, tokenizer.backend_tokenizer)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in written.items():
        writer.add_string(key.replace("_", "."), value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    output = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    for name, weights in _named(model):
        if weights.ndim == 1:
            writer.add_tensor(name, weights)
        else:
            type_ = gguf.GGMLQuantizationType[output_kind or kind if name == output else kind]
            writer.add_tensor(name, gguf.quants.quantize(weights, type_), raw_dtype=type_)
    finish(writer)
    return file


_PARTS = {
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


def _named(model):
    config = model.config
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "output.weight", state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _PARTS.items():
            weights = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if heads is not None:
                # llama.cpp turns neighbouring dimensions where transformers turns halves
                halves = weights.reshape(heads, 2, -1, weights.shape[-1])
                weights = halves.swapaxes(1, 2).reshape(weights.shape)
            yield f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weights)

"""Tiny random models of real architectures: the one place that makes them."""

import pytest

VOCABULARY = 300
MASK_IDS = (296, 297, 298)
FOUR = ("llama", "gpt2", "qwen3", "mixtral")
"""Rotated and learned positions, fused and separate projections, norms of heads, experts."""


def in_all(families):
    """Return families as parameters of a test: four in every run, the others in the slow lane."""
    return [pytest.param(each, marks=() if each in FOUR else pytest.mark.slow, id=each) for each in families]


def tiny_model(family="llama", *, dtype=None, **changes):
    """Make the random model of a family, float32 unless another dtype is given; its text is varied."""
    import torch
    from transformers import AutoModelForCausalLM

    plain, further = tiny_configs(), more_tiny_configs()
    config = (plain | further)[family]
    if changes:
        config = type(config)(**config.to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return lively(model, 0.2 if family in plain else 0.8).to(dtype or torch.float32)


def lively(model, scale=0.2):
    """Make a random model's text varied: larger weights give peaked, context-dependent logits."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def llama_of_whole_blocks(**rope):
    """Make a random Llama whose rows are whole blocks of every type of a GGUF file; `rope` are rope parameters."""
    import torch
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0} | rope,
    )
    return lively(tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32), 0.05)


def tiny_configs():
    """One small config per architecture, all of the test vocabulary."""
    import transformers as tf

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    grouped = common | {"num_key_value_heads": 2}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return {
        "llama": tf.LlamaConfig(**grouped),
        "qwen2": tf.Qwen2Config(**grouped),
        "qwen3": tf.Qwen3Config(**grouped, head_dim=8),
        "mistral": tf.MistralConfig(**grouped, sliding_window=None),
        "gemma": tf.GemmaConfig(**grouped, head_dim=8),
        "gpt_neox": tf.GPTNeoXConfig(**common),
        "gpt2": tf.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False),
        "phi": tf.PhiConfig(**grouped),
        "opt": tf.OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=32),
        "olmo2": tf.Olmo2Config(**grouped),
        "phi3": tf.Phi3Config(**grouped),
        "glm": tf.GlmConfig(**grouped, head_dim=8),
        "granite": tf.GraniteConfig(**grouped),
        "mixtral": tf.MixtralConfig(**grouped, num_local_experts=4),
        "gpt_neo": tf.GPTNeoConfig(**common, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
    }


def more_tiny_configs():
    """Further architectures, which need larger random weights for varied text."""
    import transformers as tf

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    old = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    latent = {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 128}
    extra = {
        "Falcon": {},
        "Glm4": {"head_dim": 8},
        "StableLm": {},
        "Starcoder2": {},
        "Cohere": {},
        "Cohere2": {},
        "Qwen2Moe": experts | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "Qwen3Moe": experts | {"moe_intermediate_size": 32, "head_dim": 8},
        "SmolLM3": {},
        "Gemma2": gemma,
        "Gemma3Text": gemma,
        "GPTJ": old | {"rotary_dim": 4},
        "CodeGen": old | {"rotary_dim": 4},
        "GPTBigCode": old,
        "Olmo": {},
        "Olmo3": {},
        "Olmoe": experts,
        "DeepseekV2": latent | {"head_dim": 8},
        "DeepseekV3": latent,
        "Ministral": {"sliding_window": 128, "head_dim": 8},
        "Exaone4": {"sliding_window": 128},
        "Llama4Text": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
        "Nemotron": {},
        "Persimmon": {},
        "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
        "BioGpt": {},
        "GptOss": experts | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 128},
        "Arcee": {},
        "Helium": {"head_dim": 8},
        "Ernie4_5": {},
        "HunYuanDenseV1": {"head_dim": 8},
        "DiffLlama": {},
        "CTRL": old | {"dff": 64},
    }
    return {name: getattr(tf, f"{name}Config")(**common | own) for name, own in extra.items()}

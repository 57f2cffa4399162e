"""Tiny random models of real architectures."""

VOCABULARY = 300
MASK_IDS = (296, 297, 298)


def lively(model):
    """Make a random model's text varied: larger weights give peaked, context-dependent logits."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


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

"""Which models SPACE can run on: any causal LM that follows a 4-D attention mask and position ids.

What cannot work is refused at load with one line: by its config where that tells, and else by a probe, a few short
model calls that compare a block with the same tokens run one by one.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.engine import EagerEngine, context_length, embedding_rows
from space_cli.core.quantized import has_quantized_layers
from space_cli.errors import UsageProblem

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "sparse", "moe"}
# the second of two branches: a model that puts a causal mask of its own in place of ours sees the first one there
_PROBE_BLOCK = Block.tree([0, 0, 2], 1)
_PROBE_PATH = [0, 2, 3]


def check_config(config: PretrainedConfig, name: str) -> None:
    """Refuse models that keep a running state or have no causal LM class.

    Raises:
        UsageProblem: with the reason in one line.
    """
    text = config.get_text_config()
    foreign = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if foreign:
        raise _refusal(name, f"it has {', '.join(sorted(foreign))} layers, which cannot step back over rejected tokens")
    if _has_alibi(text):
        raise _refusal(name, "its ALiBi biases count slots of the cache, not positions")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(name, f"transformers has no causal language model for {config.model_type!r}")
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False):
        raise _refusal(
            name, f"{config.model_type!r} keeps a recurrent state, which cannot step back over rejected tokens"
        )


@torch.inference_mode()
def check_block(model: PreTrainedModel, name: str) -> None:
    """Refuse a model on which a block gives other logits than the same tokens one by one.

    Raises:
        UsageProblem: with the reason in one line.
    """
    prefix, tokens = ([token % embedding_rows(model) for token in ids] for ids in ((11, 23, 5, 42), (7, 19, 31)))
    length = len(prefix) + _PROBE_BLOCK.num_slots
    if (context_length(model.config) or length) < length:
        raise _refusal(name, "its attention window is shorter than a block")
    try:
        engine = EagerEngine(model, max_length=length, max_slots=_PROBE_BLOCK.num_slots)
        engine.prefill(prefix)
        expected = torch.cat([engine.run(AR_BLOCK, [token]) for token in tokens]).float()
        engine.abandon()
        head, *candidates = tokens
        masks = prefix[: _PROBE_BLOCK.num_slots - _PROBE_BLOCK.num_tokens]
        found = engine.run(_PROBE_BLOCK, [head, prefix[0], *candidates, *masks])[_PROBE_PATH].float()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise _refusal(name, f"a block cannot be run on it ({type(error).__name__}: {reason})") from error
    spread = expected.std().clamp_min(torch.finfo(torch.float32).tiny)
    # half precision rounds rows of a block and single rows differently; a wrong mask is off by whole spreads
    allowed = 1e-2 if model.dtype == torch.float32 and not has_quantized_layers(model) else 0.5
    if (found - expected).abs().max() / spread > allowed:
        raise _refusal(name, "its logits in a block differ from those one by one: it ignores a 4-D mask or positions")


def _has_alibi(config: PretrainedConfig) -> bool:
    """Return whether distances come from slots of the cache instead of position ids (Bloom, MPT, some Falcons)."""
    return config.model_type in ("bloom", "mpt") or bool(getattr(config, "alibi", False))


def _refusal(name: str, reason: str) -> UsageProblem:
    return UsageProblem(f"{name} does not work with SPACE: {reason}", hint="choose a plain attention model")

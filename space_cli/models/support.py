"""Which models SPACE can run on: any causal LM that follows a 4-D attention mask and position ids.

What cannot work is refused at load with one line: by its config where that tells, and else by a probe, a few short
model calls that compare a block with the same tokens run one by one.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.engine import EagerEngine, context_length, embedding_rows
from space_cli.errors import UsageProblem, first_line
from space_cli.models.agreement import tolerance

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "sparse", "moe"}
# the second of two branches: a model that puts a causal mask of its own in place of ours sees the first one there
_PROBE_BLOCK = Block.tree([0, 0, 2], 1)
_PROBE_PATH = [0, 2, 3]


def check_candidates(candidates: object, name: str, masks: int, *, option: str = "candidates", hint: str) -> None:
    """Refuse a fixed number of candidates for a model without masks.

    Raises:
        UsageProblem: that is the case.
    """
    if candidates is not None and not masks:
        reason = f"{name} has no masks, and copies as many tokens as pay"
        raise UsageProblem(f"{option} {candidates}: {reason}", hint=hint)


def check_config(config: PretrainedConfig, name: str) -> None:
    """Refuse models that keep a running state, have no causal LM class, or weights in a format that is not read.

    Raises:
        UsageProblem: with the reason in one line.
    """
    _check_quantization(config, name)
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
    """Refuse a model for which a block gives different logits than the same tokens one by one.

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
        engine.rollback()
        head, *candidates = tokens
        masks = prefix[: _PROBE_BLOCK.num_slots - _PROBE_BLOCK.num_tokens]
        found = engine.run(_PROBE_BLOCK, [head, prefix[0], *candidates, *masks])[_PROBE_PATH].float()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(name, f"a block cannot be run on it ({type(error).__name__}: {first_line(error)})") from error
    if not (expected.isfinite().all() and found.isfinite().all()):
        what = "NaN" if expected.isnan().any() or found.isnan().any() else "infinity"
        raise UsageProblem(
            f"{name}: its logits are {what}: damaged weights, or a dtype too narrow for them",
            hint="try --dtype float32, or load the model anew",
        )
    if (expected == expected[:, :1]).all():
        raise UsageProblem(f"{name}: all its logits are equal: its weights are empty", hint="load the model anew")
    spread = expected.std().clamp_min(torch.finfo(torch.float32).tiny)
    if (found - expected).abs().max() / spread > tolerance(model):
        raise _refusal(name, "its logits in a block differ from those one by one: it ignores a 4-D mask or positions")


def _check_quantization(config: PretrainedConfig, name: str) -> None:
    """Refuse checkpoints whose weights were quantised by other means than bitsandbytes'."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(fields.get("quant_method") or ("bitsandbytes" if is_bitsandbytes(fields) else "unknown"))
    if not is_bitsandbytes(fields):
        raise UsageProblem(
            f"{name}: its weights are quantised by {method}; supported are bitsandbytes (int8, nf4, fp4) and GGUF",
            hint="take the checkpoint it was made from, with --quantization if it is too large",
        )
    if find_spec("bitsandbytes") is None:
        raise UsageProblem(f"{name}: its weights need bitsandbytes", hint="pip install 'space-decoding[quantization]'")


def is_bitsandbytes(fields: dict[str, Any]) -> bool:
    """Return whether a `quantization_config` is of bitsandbytes, which did not always say so."""
    method = str(fields.get("quant_method") or "")
    return method.startswith("bitsandbytes") or (not method and ("load_in_8bit" in fields or "load_in_4bit" in fields))


def _has_alibi(config: PretrainedConfig) -> bool:
    """Return whether the model uses ALiBi, which ignores position ids (Bloom, MPT, some Falcons)."""
    return config.model_type in ("bloom", "mpt") or bool(getattr(config, "alibi", False))


def _refusal(name: str, reason: str) -> UsageProblem:
    return UsageProblem(f"{name} does not work with SPACE: {reason}", hint="choose a plain attention model")

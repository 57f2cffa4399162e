"""Whether another way to run a model computes what transformers computes, but for rounding."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.engine import Compiled, EagerEngine, embedding_rows, engine_for
from space_cli.core.quantized import has_quantized_layers

# the second of two branches: whoever puts a causal mask in place of ours sees the first one there
_TREE = Block.tree([0, 0, 2], 0)


def tolerance(model: PreTrainedModel) -> float:
    """Return by how many standard deviations of the logits two ways to run a model may differ.

    Kernels round differently, in half precision and over quantised weights much so; a wrong one is off by whole
    standard deviations.
    """
    return 1e-2 if model.dtype == torch.float32 and not has_quantized_layers(model) else 0.5


@torch.inference_mode()
def agrees(compiled: Compiled, model: PreTrainedModel) -> bool:
    """Return whether a compiled model gives the model's logits, for one slot and for a tree, after a short prompt."""
    # ordinary words: behind a few control tokens half precision can be off by whole spreads (SmolLM2)
    size = embedding_rows(model)
    prefix, tokens = [size // 2, size // 3, size // 5], [size // 3, size // 7, size // 2, size // 3]
    logits = []
    for run_by in (None, compiled):
        engine: EagerEngine = engine_for(model, run_by, max_length=len(prefix) + 8, max_slots=8)
        engine.prefill(prefix)
        alone = engine.run(AR_BLOCK, tokens[:1])
        engine.rollback()
        logits.append(torch.cat([alone, engine.run(_TREE, tokens)]).float())
    expected, found = logits
    # of NaN no comparison is true
    return bool((expected - found).abs().max() <= tolerance(model) * expected.std())

"""A self-test of this machine: does a token get the same bits alone and in a block?"""

from __future__ import annotations

import torch

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.engine import engine_for
from space_cli.errors import RunFailed
from space_cli.tasks.task import Task
from space_cli.verify.record import KernelSelfTest

_PREFIX, _FOLLOWING = 64, 24
_HINT = "its weights are damaged, or --dtype is too narrow for them: try float32"


@torch.inference_mode()
def self_test(task: Task, block: Block, *, same_shape: bool) -> KernelSelfTest:
    """Evaluate the same tokens one by one and as accepted candidates of a block, and compare the logits' bits.

    Args:
        task: gives the model, the numerics and a text, which is repeated to the length needed.
        block: a chain.
        same_shape: one by one means as heads of such a block, not as calls of one row.
    """
    loaded, text_ids = task.loaded, task.prompt_ids
    most = (loaded.context_length or _PREFIX + _FOLLOWING) - block.num_slots
    length = max(2, min(_PREFIX + _FOLLOWING, most))
    ids = (list(text_ids) * (length // len(text_ids) + 1))[:length]
    prefix, following = ids[: max(1, length - _FOLLOWING)], ids[max(1, length - _FOLLOWING) :]
    masks = block.mask_token_ids(loaded.mask_token_ids) if block.masks else []
    # whole blocks only, so that every row stands for a token of the text
    following = following[: len(following) // block.num_tokens * block.num_tokens]

    engine = engine_for(
        loaded.model,
        loaded.compiled,
        max_length=length,
        max_slots=block.num_slots,
        numerics=task.numerics,
    )
    alone, together = [], []
    engine.prefill(prefix)
    for token in following:
        wrong = [token] * block.num_candidates
        alone.append(engine.run(block, [token, *wrong, *masks])[0] if same_shape else engine.run(AR_BLOCK, [token])[0])
        engine.commit([0])
    engine.prefill(prefix)
    for start in range(0, len(following), block.num_tokens):
        rows = engine.run(block, [*following[start : start + block.num_tokens], *masks])[: block.num_tokens]
        together += list(rows)
        engine.commit(range(block.num_tokens))
    if not all(row.isfinite().all() for row in (*alone, *together)):
        raise RunFailed("the model's logits are not finite, so nothing can be said of its answers", hint=_HINT)
    differences = [(one - other).abs().max().item() for one, other in zip(alone, together, strict=True)]
    return KernelSelfTest(
        positions=len(differences),
        bit_equal=sum(torch.equal(one, other) for one, other in zip(alone, together, strict=True)),
        largest_difference=max(differences, default=0.0),
    )

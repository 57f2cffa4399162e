"""The engine of a `CudaGraphModel`: blocks are graphs, prompts go through the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from space_cli.compile.cuda import SIZES, TILES, CudaGraphModel, rows_of
from space_cli.core.block import Block
from space_cli.core.engine import EagerEngine, Numerics


class GraphEngine(EagerEngine):
    """Runs blocks as the graphs of a `CudaGraphModel`.

    Args:
        model: that of the graphs.
        compiled: whose buffers the cache is laid into.
        max_slots: Q of the largest block.
        numerics: invariant, the default, pads every call to whole tiles of rows; plain runs all of `cuda.SIZES`.
        **arguments: of `EagerEngine`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compiled: CudaGraphModel,
        *,
        max_slots: int,
        numerics: Numerics | None = None,
        **arguments: Any,
    ) -> None:
        self._sizes = SIZES if numerics == "plain" else TILES
        super().__init__(model, max_slots=rows_of(max_slots, self._sizes), numerics="plain", **arguments)
        self._compiled = compiled
        compiled.lend(self.cache, self.cache.capacity.slots)

    def run(self, block: Block, slot_ids: Sequence[int]) -> torch.Tensor:
        """Run a block after the committed prefix; return (Q, V) logits. The cache then holds all slots of the block."""
        self._slot_ids = slot_ids
        logits, self.top_k = self._compiled.run(
            block,
            slot_ids,
            self.cache,
            rows=rows_of(block.num_slots, self._sizes),
            last_position=self._last_position,
        )
        return logits

    def commit(self, slots: Sequence[int]) -> None:
        """End a step: only `slots` (head and accepted candidates) of the block join the committed prefix."""
        self._compiled.commit(self.cache, self.length - len(self._slot_ids), slots)
        self.cache.token_ids += [self._slot_ids[slot] for slot in slots]

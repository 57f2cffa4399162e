"""How a step is run: prefill, run a block, settle what was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from space_cli.core.block import Block
from space_cli.core.cache import KVCache


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can attend over, or None where its config sets no limit.

    A sliding window is a limit too: a block's mask shows every slot the whole prefix.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    limits = [getattr(text, "max_position_embeddings", None), getattr(text, "max_seq_len", None), window]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many token ids the model can read."""
    return cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings


class EagerEngine:
    """Runs one block shape through an unpatched transformers model, with masks and positions made once.

    Args:
        model: a causal LM that takes a 4-D attention mask and position ids.
        block: the shape of every step.
        max_length: prompt and new tokens together.
    """

    def __init__(self, model: PreTrainedModel, block: Block, *, max_length: int) -> None:
        self.model = model
        self.block = block
        self.cache = KVCache(max_length + block.num_slots)
        # slots beyond the context hold nothing that can still be emitted, and learned positions have no row for them
        last = (context_length(model.config) or max_length + block.num_slots) - 1
        positions = torch.arange(max_length)[:, None] + block.position_ids(0)
        self._position_ids = positions.clamp_(max=last)[:, None].to(model.device)
        self._max_length = max_length
        self._mask = self._additive_mask(block, max_length, model) if block.num_slots > 1 else None

    @staticmethod
    def _additive_mask(block: Block, max_length: int, model: PreTrainedModel) -> torch.Tensor:
        """Return the mask of the longest prefix; a shorter prefix is a slice of it, since all prefix columns are equal.

        Additive and of the model's dtype: eager attention takes no other, and SDPA on CPU would turn a boolean mask
        into this one again in every layer.
        """
        visible = block.attention_mask(max_length).to(model.device)
        additive = torch.zeros(visible.shape, dtype=model.dtype, device=model.device)
        return additive.masked_fill_(~visible, torch.finfo(model.dtype).min)

    @property
    def length(self) -> int:
        """L, tokens in the cache."""
        return self.cache.length

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Put tokens into the cache; no logits are computed."""
        if not token_ids:
            return
        start = self.length
        positions = torch.arange(start, start + len(token_ids), device=self.model.device)[None]
        self.model.base_model(
            input_ids=torch.tensor([list(token_ids)], device=self.model.device),
            position_ids=positions,
            past_key_values=self.cache.past_key_values,
            use_cache=True,
        )

    def run(self, slot_ids: Sequence[int]) -> torch.Tensor:
        """Run the block behind the settled prefix; return (Q, V) logits. The cache then holds all slots.

        Args:
            slot_ids: the token id in each slot, Q of them.
        """
        length = self.length
        # one query needs no mask, and transformers then takes its faster grouped-query path
        mask = None if self._mask is None else self._mask[..., self._max_length - length :]
        logits: torch.Tensor = self.model(
            input_ids=torch.tensor([slot_ids], device=self.model.device),
            attention_mask=mask,
            position_ids=self._position_ids[length],
            past_key_values=self.cache.past_key_values,
            use_cache=True,
        ).logits
        return logits[0]

    def settle(self, slots: Sequence[int]) -> None:
        """End a step: of the block's slots only `slots` (head and accepted candidates) join the settled prefix."""
        self.cache.keep(self.length - self.block.num_slots, slots)

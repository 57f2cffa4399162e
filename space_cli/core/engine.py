"""How a step is run: prefill, run a block, settle what was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from space_cli.core.attention import KEY_TILE, can_be_invariant, invariant_attention_of
from space_cli.core.block import Block
from space_cli.core.cache import KVCache

Numerics = Literal["plain", "invariant"]
"""plain: the model's own attention over the used part of the cache. invariant: calls of one inner shape whatever the
block and the length, so that half precision rounds a token alike in AR and SPACE (see `core.attention`)."""


def default_numerics(model: PreTrainedModel) -> Numerics:
    """Return invariant where it makes AR and SPACE agree bit for bit at no cost: half precision with SDPA on a CPU."""
    return "invariant" if can_be_invariant(model) else "plain"


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
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


class EagerEngine:
    """Runs one block shape through an unpatched transformers model, with masks and positions made once.

    Args:
        model: a causal LM that takes a 4-D attention mask and position ids.
        block: the shape of every step.
        max_length: prompt and new tokens together.
        numerics: None is the model's default.
        cache: of an earlier generation with the same model, to go on from; None starts with an empty one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block: Block,
        *,
        max_length: int,
        numerics: Numerics | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.model = model
        self.block = block
        self._tile = KEY_TILE if (numerics or default_numerics(model)) == "invariant" else 1
        self.cache = KVCache() if cache is None else cache
        self.cache.reserve(-(-(max_length + block.num_slots) // self._tile) * self._tile)
        # slots beyond the context hold nothing that can still be emitted, and learned positions have no row for them
        last = (context_length(model.config) or max_length + block.num_slots) - 1
        positions = torch.arange(max_length)[:, None] + block.position_ids(0)
        self._position_ids = positions.clamp_(max=last)[:, None].to(model.device)
        self._max_length = max_length
        self._slot_ids: Sequence[int] = ()
        # one query that sees all keys needs no mask, and transformers then takes its faster grouped-query path
        self._mask = self._additive_mask() if block.num_slots > 1 or self._tile > 1 else None

    def _additive_mask(self) -> torch.Tensor:
        """Return the mask of the longest prefix; a shorter prefix is a slice of it, since all prefix columns are equal.

        Behind the block stand hidden columns, one tile less one. Additive and of the model's dtype: eager attention
        takes no other, and SDPA on CPU would turn a boolean mask into this one again in every layer.
        """
        visible = nn.functional.pad(self.block.attention_mask(self._max_length), (0, self._tile - 1))
        additive = torch.zeros(visible.shape, dtype=self.model.dtype)
        return additive.masked_fill_(~visible, torch.finfo(self.model.dtype).min).to(self.model.device)

    @property
    def length(self) -> int:
        """L, tokens in the cache."""
        return self.cache.length

    def prefill(self, token_ids: Sequence[int]) -> int:
        """Make the cache hold these tokens, no more and no less; return how many of them were computed.

        What an earlier generation left of them is kept. No logits are computed.
        """
        held = self.cache.token_ids
        start = next((n for n, pair in enumerate(zip(held, token_ids, strict=False)) if pair[0] != pair[1]), None)
        start = min(len(held), len(token_ids)) if start is None else start
        self.cache.rollback(start)
        self.cache.extent.multiple = 1
        if start < len(token_ids):
            positions = torch.arange(start, len(token_ids), device=self.model.device)[None]
            with self._attention():
                self.model.base_model(
                    input_ids=torch.tensor([list(token_ids[start:])], device=self.model.device),
                    position_ids=positions,
                    past_key_values=self.cache.past_key_values,
                    use_cache=True,
                )
            held += token_ids[start:]
        return len(token_ids) - start

    def run(self, slot_ids: Sequence[int]) -> torch.Tensor:
        """Run the block behind the settled prefix; return (Q, V) logits. The cache then holds all slots.

        Args:
            slot_ids: the token id in each slot, Q of them.
        """
        length = self.length
        self._slot_ids = slot_ids
        self.cache.extent.multiple = self._tile
        first = self._max_length - length
        shown = self.cache.extent.of(length + self.block.num_slots)
        mask = None if self._mask is None else self._mask[..., first : first + shown]
        with self._attention():
            logits: torch.Tensor = self.model(
                input_ids=torch.tensor([slot_ids], device=self.model.device),
                attention_mask=mask,
                position_ids=self._position_ids[length],
                past_key_values=self.cache.past_key_values,
                use_cache=True,
            ).logits
        return logits[0]

    def _attention(self) -> AbstractContextManager[None]:
        return invariant_attention_of(self.model) if self._tile > 1 else nullcontext()

    def settle(self, slots: Sequence[int]) -> None:
        """End a step: of the block's slots only `slots` (head and accepted candidates) join the settled prefix."""
        self.cache.keep(self.length - self.block.num_slots, slots)
        self.cache.token_ids += [self._slot_ids[slot] for slot in slots]

    def abandon(self) -> None:
        """Forget the slots of a block that was not settled."""
        self.cache.rollback(len(self.cache.token_ids))

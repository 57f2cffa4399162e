"""How a step is run: prefill, run a block, commit what was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from space_cli.core.attention import KEY_TILE, can_be_invariant, invariant_attention_of
from space_cli.core.block import Block
from space_cli.core.cache import KVCache, cache_arguments
from space_cli.core.sampling import TopK
from space_cli.core.stream import common_prefix_length

Numerics = Literal["plain", "invariant"]
"""plain: the model's own attention over the used part of the cache. invariant: calls of one inner shape whatever the
block and the length, so that half precision rounds a token alike in AR and SPACE (see `core.attention`)."""


def default_numerics(model: PreTrainedModel) -> Numerics:
    """Return invariant where it makes AR and SPACE agree bit for bit at no cost: half precision with SDPA on a CPU."""
    return "invariant" if can_be_invariant(model) else "plain"


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can attend over, or None where its config sets no limit.

    A sliding window is a limit too: a block's mask shows every slot the whole prefix. With long rope
    the limit is where the scaling factors change (Phi-3 128k): a block that crosses it would use different factors than
    its head alone.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    limits = [
        getattr(text, "max_position_embeddings", None),
        getattr(text, "max_seq_len", None),
        window,
        *_rope_changes(text),
    ]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _rope_changes(config: PretrainedConfig) -> list[Any]:
    """Return the lengths at which transformers' long rope takes other factors for all positions."""
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    original = getattr(config, "original_max_position_embeddings", None)
    return [
        each.get("original_max_position_embeddings") or original
        for each in layers
        if each.get("rope_type") == "longrope"
    ]


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many token ids the model can read."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


class EagerEngine:
    """Runs blocks through an unpatched transformers model, whatever their shapes.

    Args:
        model: a causal LM that takes a 4-D attention mask and position ids.
        max_length: prompt and new tokens together.
        max_slots: Q of the largest block.
        numerics: None is the model's default.
        cache: of an earlier generation with the same model, to go on from; None starts with an empty one.

    Attributes:
        top_k: the most probable tokens of the last call, where they are known without looking at its logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_length: int,
        max_slots: int,
        numerics: Numerics | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.model = model
        self._tile = KEY_TILE if (numerics or default_numerics(model)) == "invariant" else 1
        self.cache = KVCache() if cache is None else cache
        self.cache.reserve(-(-(max_length + max_slots) // self._tile) * self._tile)
        # slots beyond the context hold nothing that can still be emitted, and learned positions have no row for them
        self._last_position = (context_length(model.config) or max_length + max_slots) - 1
        self._slot_ids: Sequence[int] = ()
        self.top_k: TopK | None = None

    @property
    def length(self) -> int:
        """L, tokens in the cache."""
        return self.cache.length

    def prefill(self, token_ids: Sequence[int]) -> int:
        """Fill the cache with these tokens, reusing the prefix it already holds; return how many were computed.

        Cached tokens that differ are dropped. No logits are computed.
        """
        held = self.cache.token_ids
        start = common_prefix_length(held, token_ids)
        self.cache.crop(start)
        if start < len(token_ids):
            self._extend(token_ids[start:])
            held += token_ids[start:]
        return len(token_ids) - start

    def _extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the cache."""
        start = self.length
        self.cache.capacity.multiple = 1
        with self._attention():
            self.model.base_model(
                input_ids=torch.tensor([list(token_ids)], device=self.model.device),
                position_ids=torch.arange(start, start + len(token_ids), device=self.model.device)[None],
                **cache_arguments(self.model.base_model, self.cache.cache),
            )

    def run(self, block: Block, slot_ids: Sequence[int]) -> torch.Tensor:
        """Run a block after the committed prefix; return (Q, V) logits. The cache then holds all slots of the block.

        Args:
            block: its shape.
            slot_ids: the token id in each slot, Q of them.
        """
        self._slot_ids = slot_ids
        self.cache.capacity.multiple = self._tile
        with self._attention():
            logits: torch.Tensor = self.model(
                input_ids=torch.tensor([slot_ids], device=self.model.device),
                attention_mask=self._mask(block),
                position_ids=block.position_ids(self.length).clamp_(max=self._last_position).to(self.model.device),
                **cache_arguments(self.model, self.cache.cache),
            ).logits
        return logits[0]

    def _mask(self, block: Block) -> torch.Tensor | None:
        """Return the (1, 1, Q, N) mask of a block behind the prefix, the unused end of the cache hidden."""
        if block.num_slots == 1 and self._tile == 1:
            # one query that sees all keys needs none, and transformers then takes its faster grouped-query path
            return None
        num_keys = self.cache.capacity.shown(self.length + block.num_slots)
        return block.attention_mask(self.length, num_keys=num_keys, dtype=self.model.dtype, device=self.model.device)

    def _attention(self) -> AbstractContextManager[None]:
        return invariant_attention_of(self.model) if self._tile > 1 else nullcontext()

    def commit(self, slots: Sequence[int]) -> None:
        """End a step: only `slots` (head and accepted candidates) of the block join the committed prefix."""
        self.cache.commit(self.length - len(self._slot_ids), slots)
        self.cache.token_ids += [self._slot_ids[slot] for slot in slots]

    def rollback(self) -> None:
        """Drop the slots of the last block unless it was committed."""
        self.cache.crop(len(self.cache.token_ids))


class Compiled(Protocol):
    """A model in a compiled form (see the package `compile`), which brings the engine that runs it."""

    def engine(self, model: PreTrainedModel, **arguments: Any) -> EagerEngine:
        """Return the engine; arguments are those of `EagerEngine`."""


def engine_for(model: PreTrainedModel, compiled: Compiled | None, **arguments: Any) -> EagerEngine:
    """Return the engine that runs a model, compiled or as it is; arguments are those of `EagerEngine`."""
    return EagerEngine(model, **arguments) if compiled is None else compiled.engine(model, **arguments)

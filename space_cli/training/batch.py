"""Batched answers of a model: each row has its own length, and the next prompt takes a finished row's place.

Decoding one answer reads all weights for one token; a batch reads them for all of its rows. Keys and values lie in one
buffer per layer, each row written at its own place, so nothing is padded, copied or moved while answers grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from space_cli.core.attention import attention_of
from space_cli.core.cache import cache_arguments

GROUPED = "space_grouped"
"""Name of `grouped_attention` in transformers' attention interface."""
_KEY_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be answered.

    Attributes:
        prompt_ids: at least one.
        max_new_tokens: the answer is cut there.
        temperature: 0 is greedy.
        seed: of a sampled answer.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass
class _Row:
    """An answer in progress; `number` is that of its request."""

    number: int
    request: Request
    answer: list[int]
    generator: torch.Generator = field(repr=False)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return len(self.request.prompt_ids) + len(self.answer) - 1


@torch.inference_mode()
def answer_in_batches(
    model: PreTrainedModel, requests: Sequence[Request], *, rows: int, eos_token_ids: frozenset[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield (request number, answer token ids) as answers end; the ids include the closing token.

    Args:
        model: a causal LM in evaluation mode.
        requests: answered in this order, `rows` at a time.
        rows: most answers written at once.
        eos_token_ids: every id that ends an answer.
    """
    cache = _RowCache(rows)
    waiting = list(enumerate(requests))[::-1]
    running: list[_Row] = []
    with attention_of(model, GROUPED):
        while waiting or running:
            while waiting and len(running) < rows:
                row = _Row(*waiting.pop(), [], torch.Generator())
                row.generator.manual_seed(row.request.seed)
                logits = cache.prefill(model, len(running), row.request)
                row.answer.append(_choose(logits, row))
                running.append(row)
            ended = [index for index, row in enumerate(running) if _has_ended(row, eos_token_ids)]
            for index in reversed(ended):
                yield running[index].number, running[index].answer
                cache.move(len(running) - 1, index)
                running[index] = running[-1]
                running.pop()
            if running and not ended:
                for row, logits in zip(running, cache.step(model, running), strict=True):
                    row.answer.append(_choose(logits, row))


def _has_ended(row: _Row, eos_token_ids: frozenset[int]) -> bool:
    return row.answer[-1] in eos_token_ids or len(row.answer) >= row.request.max_new_tokens


def _choose(logits: torch.Tensor, row: _Row) -> int:
    """Return the greedy token, or one sampled by the Gumbel-max trick with the row's own noise."""
    if row.request.temperature == 0:
        return int(logits.argmax())
    noise = -torch.empty(logits.shape).exponential_(generator=row.generator).log()
    return int((logits.float() / row.request.temperature + noise.to(logits.device)).argmax())


class _RowCache:
    """KV cache of a batch whose rows differ in length.

    Attributes:
        rows: there is room for.
        capacity: slots of a row.
        lengths: (B) int64, where each running row is written next.
        shown: slots that a step attends over.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.capacity = self.shown = 0
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self._cache = Cache(layer_class_to_replicate=cast(Any, partial(_RowLayer, self)))

    @property
    def _layers(self) -> list[_RowLayer]:
        return cast(list[_RowLayer], self._cache.layers)

    def prefill(self, model: PreTrainedModel, index: int, request: Request) -> torch.Tensor:
        """Prefill a prompt into a row; return the (V) logits after it."""
        prompt = DynamicCache()
        ids = torch.tensor([request.prompt_ids], device=model.device)
        logits = model(ids, logits_to_keep=1, **cache_arguments(model, prompt)).logits
        longest = len(request.prompt_ids) + request.max_new_tokens
        self.capacity = max(self.capacity, -(-longest // _KEY_MULTIPLE) * _KEY_MULTIPLE)
        while len(self._layers) < len(prompt.layers):
            self._layers.append(_RowLayer(self))
        for layer, computed in zip(self._layers, prompt.layers, strict=True):
            of_prompt = cast(DynamicLayer, computed)
            layer.fill(index, cast(torch.Tensor, of_prompt.keys), cast(torch.Tensor, of_prompt.values))
        return cast(torch.Tensor, logits[0, -1])

    def step(self, model: PreTrainedModel, running: Sequence[_Row]) -> torch.Tensor:
        """Compute the newest token of each row; return (B, V) logits."""
        device = model.device
        self.lengths = torch.tensor([row.length for row in running], device=device)
        self.shown = -(-(max(row.length for row in running) + 1) // _KEY_MULTIPLE) * _KEY_MULTIPLE
        hidden = torch.arange(self.shown, device=device)[None] > self.lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=model.dtype, device=device)
        mask = mask.masked_fill_(hidden, torch.finfo(model.dtype).min)[:, None, None]
        ids = torch.tensor([[row.answer[-1]] for row in running], device=device)
        positions = self.lengths[:, None]
        logits = model(ids, attention_mask=mask, position_ids=positions, **cache_arguments(model, self._cache)).logits
        return cast(torch.Tensor, logits[:, -1])

    def move(self, source: int, target: int) -> None:
        """Move one row's keys and values to another row."""
        if source != target:
            for layer in self._layers:
                for states in (layer.keys, layer.values):
                    states[target] = states[source]


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, H, capacity, D)."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, shared: _RowCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shared = shared

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate buffers like (B, H, Q, D) states."""
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self._shared.rows, states.shape[1], self._shared.capacity, states.shape[3])
            setattr(self, name, states.new_zeros(shape))
        self.is_initialized = True

    def fill(self, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write a prompt's (1, H, Q, D) states into a row; grow the buffers if necessary."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        missing = self._shared.capacity - self.keys.shape[2]
        if missing > 0:
            self.keys, self.values = (functional.pad(states, (0, 0, 0, missing)) for states in (self.keys, self.values))
        self.keys[row, :, : keys.shape[2]] = keys[0]
        self.values[row, :, : values.shape[2]] = values[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, H, 1, D) states, each row at its own position; return views (B, H, shown, D)."""
        count = len(key_states)
        rows = torch.arange(count, device=key_states.device)
        self.keys[rows, :, self._shared.lengths] = key_states[:, :, 0]
        self.values[rows, :, self._shared.lengths] = value_states[:, :, 0]
        return self.keys[:count, :, : self._shared.shown], self.values[:count, :, : self._shared.shown]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number of keys and offset of the first."""
        return self._shared.shown, 0

    def get_seq_length(self) -> int:
        """Return the slots of the longest row."""
        return self._shared.shown

    def get_max_length(self) -> int:
        """Return the length of the buffer."""
        return self._shared.capacity


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with one query per row; heads that share a key head are rows of one product, so keys are never copied.

    Shapes as in transformers' attention functions: query (B, H, 1, D), keys (B, H_kv, N, D). Calls of other shapes go
    to transformers' SDPA.
    """
    batch, heads, queries, width = query.shape
    if queries != 1 or attention_mask is None or heads == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    output = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, value.shape[3]), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)

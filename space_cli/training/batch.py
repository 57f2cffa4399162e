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
_PREFILLED = 4096
"""Slots of prompts computed at once."""


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
    def newest(self) -> int:
        """The token to compute next."""
        return self.answer[-1] if self.answer else self.request.prompt_ids[-1]

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
    longest = max((len(each.prompt_ids) + each.max_new_tokens for each in requests), default=0)
    cache = _RowCache(min(rows, len(requests)), -(-longest // _KEY_MULTIPLE) * _KEY_MULTIPLE)
    waiting = list(enumerate(requests))[::-1]
    running: list[_Row] = []
    with attention_of(model, GROUPED):
        while waiting or running:
            new = [_begun(*waiting.pop(), model) for _ in range(min(len(waiting), rows - len(running)))]
            cache.prefill(model, len(running), [row.request.prompt_ids[:-1] for row in new])
            running += new
            for row, token in zip(running, _chosen(cache.step(model, running), running), strict=True):
                row.answer.append(token)
            for index in reversed([index for index, row in enumerate(running) if _has_ended(row, eos_token_ids)]):
                yield running[index].number, running[index].answer
                cache.move(len(running) - 1, index)
                running[index] = running[-1]
                running.pop()


def _begun(number: int, request: Request, model: PreTrainedModel) -> _Row:
    return _Row(number, request, [], torch.Generator(model.device).manual_seed(request.seed))


def _has_ended(row: _Row, eos_token_ids: frozenset[int]) -> bool:
    return row.answer[-1] in eos_token_ids or len(row.answer) >= row.request.max_new_tokens


def _chosen(logits: torch.Tensor, rows: Sequence[_Row]) -> list[int]:
    """Return each row's greedy token, or one sampled by the Gumbel-max trick with the row's own noise."""
    sampled = [index for index, row in enumerate(rows) if row.request.temperature]
    if sampled:
        logits = logits.float()
    for index in sampled:
        noise = torch.empty_like(logits[index]).exponential_(generator=rows[index].generator).log_()
        logits[index].div_(rows[index].request.temperature).sub_(noise)
    return cast(list[int], logits.argmax(dim=-1).tolist())


class _RowCache:
    """KV cache of a batch whose rows differ in length.

    Attributes:
        rows: there is room for.
        capacity: slots of a row.
        lengths: (B) int64, where each running row is written next.
        shown: slots that a step attends over.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity, self.shown = rows, capacity, 0
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self._cache = Cache(layer_class_to_replicate=cast(Any, partial(_RowLayer, self)))

    @property
    def _layers(self) -> list[_RowLayer]:
        return cast(list[_RowLayer], self._cache.layers)

    def prefill(self, model: PreTrainedModel, first: int, prompts: Sequence[Sequence[int]]) -> None:
        """Prefill prompts into consecutive rows, some at a time; what pads the shorter ones is never seen."""
        at_once = max(1, _PREFILLED // (max((len(ids) for ids in prompts), default=0) or 1))
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            width = max(len(ids) for ids in some)
            if width:
                padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in some], device=model.device)
                computed = DynamicCache()
                model.base_model(input_ids=padded, **cache_arguments(model.base_model, computed))
                self._take_in(first + start, computed)

    def _take_in(self, first: int, computed: DynamicCache) -> None:
        while len(self._layers) < len(computed.layers):
            self._layers.append(_RowLayer(self))
        for layer, prompts in zip(self._layers, computed.layers, strict=True):
            of_prompts = cast(DynamicLayer, prompts)
            layer.fill(first, cast(torch.Tensor, of_prompts.keys), cast(torch.Tensor, of_prompts.values))

    def step(self, model: PreTrainedModel, running: Sequence[_Row]) -> torch.Tensor:
        """Compute the newest token of each row; return (B, V) logits."""
        device = model.device
        self.lengths = torch.tensor([row.length for row in running], device=device)
        self.shown = -(-(max(row.length for row in running) + 1) // _KEY_MULTIPLE) * _KEY_MULTIPLE
        hidden = torch.arange(self.shown, device=device)[None] > self.lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=model.dtype, device=device)
        mask = mask.masked_fill_(hidden, torch.finfo(model.dtype).min)[:, None, None]
        ids = torch.tensor([[row.newest] for row in running], device=device)
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

    def fill(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the (B, H, Q, D) states of prompts into consecutive rows."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for own, states in ((self.keys, keys), (self.values, values)):
            own[first : first + len(states), :, : states.shape[2]] = states

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, H, 1, D) states, each row at its own position; return views (B, H, shown, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
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

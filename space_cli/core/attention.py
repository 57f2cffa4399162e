"""Attention whose rows do not depend on the shape of the call: the same bits alone, in a block, at any cache length.

In half precision a token evaluated in a block and the same token alone may round differently, and where two logits
nearly tie the texts part. On CPUs the matrix products of half precision were already independent of the number of rows;
SDPA was not: it picks its inner products by the number of queries and keys. Two things make them always the same.
Keys come in whole tiles of SDPA's own size, the surplus masked (an exact zero in the sum), and queries in whole
multiples of a few rows, measured once on the machine at hand.

Measured (AMD EPYC, AVX-512 bfloat16, torch 2.13): of 8,400 random rows in bfloat16, float16 and float32 with head
dimensions 16 to 256 none differs, where plain SDPA differs in 8 to 33 % of bfloat16 rows. An answer of nano takes 3 %
longer: whole tiles cost more, but SDPA takes a third of the time for four bfloat16 queries that it takes for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from space_cli.core.quantized import has_quantized_layers

INVARIANT = "space_invariant"
"""Its name in transformers' attention interface."""
KEY_TILE = 512
"""Keys that SDPA takes at once on CPU (`kvSplitSize` in ATen's FlashAttentionKernel.cpp)."""
# queries that SDPA takes at once there (`qSplitSize`) in calls of fewer than 192
_ROW_TILE, _SMALL_CALL = 32, 160
_TRIALS = 24
_BEYOND_SOFTMAX = ("position_bias", "s_aux", "softcap", "head_mask")


def padded_length(length: int) -> int:
    """Return `length` rounded up to a multiple of `KEY_TILE`."""
    return -(-length // KEY_TILE) * KEY_TILE


def can_be_invariant(model: PreTrainedModel) -> bool:
    """Return whether this attention makes the model's rows independent of the shape of a call.

    That is SDPA on a CPU with half precision, or with weights as GGUF files have them. In float32 the matrix products
    themselves depend on the shape.
    """
    exact = model.dtype != torch.float32 or has_quantized_layers(model)
    return model.device.type == "cpu" and exact and has_replaceable_attention(model)


def has_replaceable_attention(model: PreTrainedModel) -> bool:
    """Return whether the model calls SDPA through transformers' attention interface."""
    return model.config.get_text_config()._attn_implementation == "sdpa" and model._can_set_attn_implementation()


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what an attention layer asks of its kernel beyond the plain product of softmaxes.

    Raises:
        NotImplementedError: names what it asks for.
    """
    asked = [name for name in _BEYOND_SOFTMAX if arguments.get(name) is not None]
    if asked:
        raise NotImplementedError(f"its attention takes {', '.join(asked)}")


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use one of our attentions in the model within the context; a model with its own attention keeps it.

    Args:
        model: that calls it.
        name: in transformers' attention interface.
    """
    if not has_replaceable_attention(model):
        yield
        return
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"


def invariant_attention_of(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Use the attention of this module in the model within the context."""
    return attention_of(model, INVARIANT)


def invariant_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention in calls of one inner shape for one token, a block or a whole prompt alike.

    Args:
        module: the attention layer.
        query: (B, H, Q, D).
        key: (B, H_kv, N, D), H a multiple of H_kv; filled up to whole tiles where N is not.
        value: (B, H_kv, N, D).
        attention_mask: (B or 1, 1, Q, N), additive or bool; or None for causal attention, the last query at key N - 1.
        scaling: of the products; None is D ** -0.5.
        **kwargs: what transformers passes to SDPA.

    Returns:
        (B, Q, H, D) and no weights, as transformers' attention functions do.
    """
    if kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, length = query.shape[2], key.shape[2]
    key, value = _whole_tiles(key), _whole_tiles(value)
    at_once = max(1, _SMALL_CALL * key.shape[1] // query.shape[1])
    if attention_mask is not None and rows <= at_once:
        output = _attend(query, key, value, _additive(attention_mask, key.shape[2], query.dtype), scaling)
        return output.transpose(1, 2).contiguous(), None
    parts = []
    for start in range(0, rows, at_once):
        end = min(rows, start + at_once)
        if attention_mask is None:
            shown = padded_length(length - rows + end)
            mask = _causal_mask(length - rows + start, end - start, shown, query.dtype, query.device)
        else:
            shown, mask = key.shape[2], _additive(attention_mask[:, :, start:end], key.shape[2], query.dtype)
        parts.append(_attend(query[:, :, start:end], key[:, :, :shown], value[:, :, :shown], mask, scaling))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Return (B, H, Q, D) of such queries, at most `_SMALL_CALL` per key head, under a (1, 1, Q, N) additive mask."""
    batch, num_heads, rows, width = query.shape
    per_group = num_heads // key.shape[1]
    stacked = rows * per_group
    if per_group > 1:
        # the heads that share a key head are rows of one product, so keys are never copied
        query = query.reshape(batch, key.shape[1], stacked, width)
        mask = mask if rows == 1 else torch.cat([mask] * per_group, dim=2)  # a quarter of the time of `repeat`
    # what is left for the last tile of rows must not be too few
    surplus = max(0, least_rows(query.dtype, width) - stacked % _ROW_TILE) if stacked % _ROW_TILE else 0
    if surplus:
        query = functional.pad(query, (0, 0, 0, surplus))
        mask = mask if rows == 1 else functional.pad(mask, (0, 0, 0, surplus))
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    if surplus:
        output = output[:, :, :stacked]
    return output if per_group == 1 else output.reshape(batch, num_heads, rows, value.shape[3])


def _whole_tiles(states: torch.Tensor) -> torch.Tensor:
    """Return keys or values padded to whole tiles; no copy if they already are."""
    surplus = padded_length(states.shape[2]) - states.shape[2]
    return functional.pad(states, (0, 0, 0, surplus)) if surplus else states


def _additive(mask: torch.Tensor, shown: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask additive and `shown` columns wide, what is missing hidden."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    surplus = shown - mask.shape[3]
    return functional.pad(mask, (0, surplus), value=torch.finfo(dtype).min) if surplus else mask


@lru_cache(maxsize=4)  # the layers of a model ask for the same ones one after the other
def _causal_mask(first: int, rows: int, shown: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the (1, 1, rows, shown) additive mask of queries that stand at keys `first` and on."""
    hidden = torch.arange(shown, device=device) > torch.arange(first, first + rows, device=device)[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


@lru_cache
@torch.inference_mode()
def least_rows(dtype: torch.dtype, width: int) -> int:
    """Return the smallest number of query rows for which SDPA gives the same bits as for a whole tile of rows.

    Measured on this machine with random rows, in some ten milliseconds; a whole tile where no smaller number holds.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, _TRIALS, rows, width, generator=generator).to(dtype) for rows in (_ROW_TILE, KEY_TILE, KEY_TILE)
    )
    mask = torch.zeros(1, 1, 1, KEY_TILE, dtype=dtype)
    mask[..., KEY_TILE // 2 + 1 :] = torch.finfo(dtype).min
    whole = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    for rows in range(_ROW_TILE - 1, 0, -1):
        part = functional.scaled_dot_product_attention(query[:, :, -rows:], key, value, attn_mask=mask)
        if not torch.equal(part, whole[:, :, -rows:]):
            return rows + 1
    return 1


AttentionInterface.register(INVARIANT, invariant_attention)
AttentionMaskInterface.register(INVARIANT, sdpa_mask)

"""Profile of model calls: their cost by slots and prefix length, against the memory bandwidth."""

from __future__ import annotations

import time

import torch
from pydantic import BaseModel

from space_cli.core.costs import MAX_BLOCK_SLOTS, measure_costs
from space_cli.core.engine import engine_for
from space_cli.models.loading import LoadedModel

_BYTES_READ = 1 << 28
_PASSES = 5
_SHORTEST = 256


class Profile(BaseModel):
    """Cost of model calls on this machine.

    Attributes:
        weight_bytes: read by a call of any size; rows of input embeddings alone are looked up, not read whole.
        bytes_per_second: at which this machine reads memory, more than any cache holds; the best of a few passes.
        roofline_seconds: of a call that did nothing but read its weights from memory. A model that fits a cache can be
            faster.
        seconds: of a call, by the length of its prefix and by its number of slots.
    """

    weight_bytes: int
    bytes_per_second: float
    roofline_seconds: float
    seconds: dict[int, dict[int, float]]


def profile(loaded: LoadedModel) -> Profile:
    """Time calls of all sizes after prefixes of growing length, up to the model's context or 4,096 tokens."""
    limit = min(loaded.context_length or 4096, 4096) - MAX_BLOCK_SLOTS
    lengths, length = [], min(_SHORTEST, limit)
    while length < limit:
        lengths.append(length)
        length *= 2
    lengths.append(limit)
    seconds = {}
    for length in lengths:
        engine = engine_for(loaded.model, loaded.compiled, max_length=length, max_slots=MAX_BLOCK_SLOTS)
        seconds[length] = dict(measure_costs(engine, length).seconds)
    size, rate = weight_bytes(loaded), read_bandwidth(loaded.model.device)
    return Profile(weight_bytes=size, bytes_per_second=rate, roofline_seconds=size / rate, seconds=seconds)


def weight_bytes(loaded: LoadedModel) -> int:
    """Return how many bytes of weights a model call reads."""
    model = loaded.model
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(parameter.nbytes for parameter in model.parameters())
    tied = outputs is not None and outputs.weight is inputs.weight
    return total if tied else total - sum(parameter.nbytes for parameter in inputs.parameters())


@torch.inference_mode()
def read_bandwidth(device: torch.device) -> float:
    """Measure how fast a device reads its memory, in bytes per second, by summing a quarter of a gibibyte."""
    data = torch.ones(_BYTES_READ // 4, device=device)
    best = float("inf")
    for _ in range(_PASSES):
        began = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - began)
    return _BYTES_READ / best

"""What a model call costs by its number of slots, measured on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property

import torch

from space_cli.core.block import Block
from space_cli.core.engine import EagerEngine

MOST_SLOTS = 32
"""Q of the largest block: none measured pays beyond, and up to here half precision keeps rows independent on CPUs."""
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32)
_MOST_ROUNDS, _SECONDS = 25, 1.0


class StepCosts:
    """Seconds of a model call by its number of slots, between the sizes measured on a straight line.

    Args:
        seconds: by number of slots; 1 is there.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.seconds = dict(sorted(seconds.items()))

    @cached_property
    def by_slots(self) -> list[float]:
        """Seconds of a call of 0, 1, ..., `MOST_SLOTS` slots; a larger block never costs less."""
        sizes, costs = list(self.seconds), list(self.seconds.values())
        table = [0.0]
        for slots in range(1, MOST_SLOTS + 1):
            upper = next((at for at, size in enumerate(sizes) if size >= slots), len(sizes) - 1)
            lower = max(0, upper - 1)
            run = sizes[upper] - sizes[lower]
            share = (slots - sizes[lower]) / run if run else 0.0
            table.append(max(table[-1], costs[lower] + share * (costs[upper] - costs[lower])))
        return table


ASSUMED_COSTS = StepCosts({1: 1.0, 8: 1.1, 32: 1.5})
"""Where nothing was measured: a call bound by reading its weights, in units of a call of one slot."""


@torch.inference_mode()
def measure_costs(engine: EagerEngine, prefix_length: int) -> StepCosts:
    """Time model calls of each size behind a prefix, the sizes in turn, for a second or so.

    Other work on the machine only ever adds time: the lower quartile of a size's calls is taken.

    Args:
        engine: with room for the prefix and a block; its cache is overwritten.
        prefix_length: tokens in front of the block.
    """
    engine.prefill([index % 7 for index in range(prefix_length)])
    blocks = [Block.chain(size - 1, 0) for size in SIZES]
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    started = time.perf_counter()
    for turn in range(_MOST_ROUNDS + 1):
        for block in blocks:
            began = time.perf_counter()
            # the chosen tokens off the device: a step ends when they are known
            engine.run(block, [0] * block.num_slots).max(dim=-1).indices.tolist()
            if turn:  # the first round warms up
                found[block.num_slots].append(time.perf_counter() - began)
            engine.abandon()
        if turn and time.perf_counter() - started > _SECONDS:
            break
    return StepCosts({size: _lower_quartile(seconds) for size, seconds in found.items()})


def _lower_quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]

"""What a model call costs by its number of slots, measured on the machine at hand."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from space_cli.core.block import Block
from space_cli.core.engine import EagerEngine
from space_cli.core.sampling import largest

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32)
"""Q of the blocks that are run: few, since kernels are prepared for a size when it is first met. None measured pays
beyond the last, and up to there half precision keeps rows independent on CPUs."""
MAX_BLOCK_SLOTS = SIZES[-1]
_MAX_CALLS, _WARM_UP, _SECONDS = 16, 4, 0.1


@dataclass(frozen=True)
class StepCosts:
    """The measured cost of steps.

    Attributes:
        seconds: of a model call, by its number of slots; all of `SIZES` are there.
        overhead: seconds of a step beside its model call.
    """

    seconds: Mapping[int, float]
    overhead: float = 0.0

    @cached_property
    def by_slots(self) -> list[float]:
        """Seconds of a step by the number of slots its block needs, padded to the next of `SIZES`."""
        return filled_up({size: seconds + self.overhead for size, seconds in self.seconds.items()})


def filled_up(seconds: Mapping[int, float]) -> list[float]:
    """Return seconds by number of slots (0 to `MAX_BLOCK_SLOTS`), where blocks are padded to the next of `SIZES`.

    A block cannot take longer than a larger one. Where it was measured so, other work interfered: take the minimum.
    """
    table, at_most = list[float](), math.inf
    for below, size in reversed(list(pairwise((0, *SIZES)))):
        at_most = min(at_most, seconds[size])
        table += [at_most] * (size - below)
    return [0.0, *reversed(table)]


ASSUMED_COSTS = StepCosts({size: 1.0 + size / 64 for size in SIZES})
"""Where nothing was measured: a call bound by reading its weights, in units of about a call of one slot."""


@torch.inference_mode()
def measure_costs(engine: EagerEngine, prefix_length: int) -> StepCosts:
    """Time model calls of each size after a prefix; takes about a second for a small model.

    A size is called many times in a row, as in an answer: after calls of another size, larger ones above all, a call
    takes longer. Other work on the machine only ever adds time: the lower quartile is taken.

    Args:
        engine: with room for the prefix and a block; its cache is overwritten.
        prefix_length: tokens in front of the block.
    """
    engine.prefill([index % 7 for index in range(prefix_length)])
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for size in SIZES:
        block, started = Block.chain(size - 1, 0), time.perf_counter()
        for call in range(_MAX_CALLS):
            began = time.perf_counter()
            # the chosen tokens off the device: a step ends when they are known
            largest(engine.run(block, [0] * size))
            ended = time.perf_counter()
            engine.rollback()
            if call >= _WARM_UP or ended - began > _SECONDS:
                found[size].append(ended - began)
            if found[size] and ended - started > _SECONDS:
                break
    return StepCosts({size: _lower_quartile(seconds) for size, seconds in found.items()})


def _lower_quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]

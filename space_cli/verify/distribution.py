"""Compares sampling with transformers' own: the random streams differ, so distributions are compared, not tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from space_cli.core.stopping import StopRule
from space_cli.tasks.plan import Planned
from space_cli.tasks.task import Task, next_token_probabilities
from space_cli.verify.record import Distribution

_MIN_EXPECTED, _MAX_BINS = 5.0, 40
_FIRST_TOKENS = 16

_Cell = tuple[int, ...]


def compare_distributions(
    planned: Planned, samplers: dict[str, Callable[[Task], list[int]]], *, draws: int
) -> list[Distribution]:
    """Compare the first two tokens of each sampler under `draws` seeds with their exact probabilities.

    Two tokens, so that a candidate is verified and what follows it is drawn too.

    Args:
        planned: the prompt; the seeds count up from its own.
        samplers: by method, what answers a task with token ids.
        draws: number of seeds.
    """
    task = replace(planned.task, stop=StopRule(2, planned.task.loaded.eos_token_ids))
    probabilities, frequent = _exact(task)
    bounds, expected = _bins(probabilities, draws)
    found = []
    for method, sampler in samplers.items():
        drawn = Counter[int]()
        for seed in range(task.sampling.seed, task.sampling.seed + draws):
            tokens = sampler(replace(task, sampling=replace(task.sampling, seed=seed)))
            cell = tuple(tokens if tokens[0] in frequent else tokens[:1])
            drawn[min(bisect_left(bounds, cell), len(bounds) - 1)] += 1
        terms = [(drawn[number] - count) ** 2 / count for number, count in enumerate(expected)]
        found.append(_result(planned, method, draws, terms))
    return found


def _bins(probabilities: dict[_Cell, float], draws: int) -> tuple[list[_Cell], list[float]]:
    """Pool neighbouring cells until each bin expects enough; return each bin's last cell and expected count.

    Likely tokens are not kept apart from unlikely ones, so that a flat distribution still makes many bins.
    """
    least = max(_MIN_EXPECTED, draws / _MAX_BINS)
    bounds: list[_Cell] = []
    expected: list[float] = []
    pooled = 0.0
    for cell in sorted(probabilities):
        pooled += draws * probabilities[cell]
        if pooled >= least:
            bounds.append(cell)
            expected.append(pooled)
            pooled = 0.0
    if not bounds:
        return [max(probabilities)], [float(draws)]
    # what is left joins the last bin
    bounds[-1] = max(probabilities)
    expected[-1] += pooled
    return bounds, expected


def _result(planned: Planned, method: str, draws: int, terms: list[float]) -> Distribution:
    chi_squared, degrees = sum(terms), len(terms) - 1
    # the survival function of the chi-squared distribution
    p_value = (
        torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(chi_squared / 2).double()).item()
        if degrees > 0
        else 1.0
    )
    return Distribution(
        suite=planned.suite.name,
        prompt=planned.name,
        method=method,
        draws=draws,
        bins=len(terms),
        chi_squared=chi_squared,
        p_value=p_value,
    )


def _exact(task: Task) -> tuple[dict[_Cell, float], set[int]]:
    """Return the probability of each pair of first tokens, pooling unlikely first tokens; and the likely ones."""
    first = next_token_probabilities(task, task.prompt_ids)
    frequent = set(first.topk(min(_FIRST_TOKENS, len(first))).indices.tolist()) - task.stop.eos_token_ids
    probabilities: dict[_Cell, float] = {}
    for token in first.nonzero()[:, 0].tolist():
        probability = first[token].item()
        if token not in frequent:
            probabilities[(token,)] = probability
        else:
            second = next_token_probabilities(task, [*task.prompt_ids, token])
            probabilities |= {
                (token, other): probability * second[other].item() for other in second.nonzero()[:, 0].tolist()
            }
    return probabilities, frequent

"""Sampling against transformers' own: its random stream differs, so distributions are compared, not tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from space_cli.bench.measure import Planned
from space_cli.bench.methods import Task, next_token_probabilities
from space_cli.core.stopping import StopRule
from space_cli.verify.record import Distribution

_LEAST_EXPECTED = 5.0
_FIRST_TOKENS = 16


def compare_distributions(
    planned: Planned, samplers: dict[str, Callable[[Task], list[int]]], *, draws: int
) -> list[Distribution]:
    """Compare the first two tokens that each sampler gives under `draws` seeds with their exact probabilities.

    Two tokens, so that a candidate is verified and what follows it is drawn too.

    Args:
        planned: the prompt; the seeds count up from its own.
        samplers: by method, what answers a task with token ids.
        draws: number of seeds.
    """
    task = replace(planned.task, stop=StopRule(2, planned.task.loaded.eos_token_ids))
    expected = {pair: draws * chance for pair, chance in _exact(task).items() if draws * chance >= _LEAST_EXPECTED}
    rest = draws - sum(expected.values())
    found = []
    for method, sampler in samplers.items():
        seeds = range(task.sampling.seed, task.sampling.seed + draws)
        drawn = Counter(tuple(sampler(replace(task, sampling=replace(task.sampling, seed=seed)))) for seed in seeds)
        terms = [(drawn[pair] - count) ** 2 / count for pair, count in expected.items()]
        others = draws - sum(drawn[pair] for pair in expected)
        # the rest is a bin of its own where enough is expected of it
        if rest >= _LEAST_EXPECTED:
            terms.append((others - rest) ** 2 / rest)
        found.append(_result(planned, method, draws, terms))
    return found


def _result(planned: Planned, method: str, draws: int, terms: list[float]) -> Distribution:
    chi_squared, degrees = sum(terms), len(terms) - 1
    # the survival function of the chi-squared distribution
    p_value = (
        torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(chi_squared / 2).double()).item()
        if degrees > 0
        else 1.0
    )
    return Distribution(
        suite=planned.suite,
        prompt=planned.task_id,
        method=method,
        draws=draws,
        bins=len(terms),
        chi_squared=chi_squared,
        p_value=p_value,
    )


def _exact(task: Task) -> dict[tuple[int, ...], float]:
    """Return the probability of each likely pair of first tokens; of an end of text, alone."""
    first = next_token_probabilities(task, task.prompt_ids)
    chances: dict[tuple[int, ...], float] = {}
    for token in first.topk(min(_FIRST_TOKENS, len(first))).indices.tolist():
        chance = first[token].item()
        if token in task.stop.eos_token_ids:
            chances[(token,)] = chance
        elif chance > 0:
            second = next_token_probabilities(task, [*task.prompt_ids, token])
            chances |= {(token, other): chance * second[other].item() for other in second.nonzero()[:, 0].tolist()}
    return chances

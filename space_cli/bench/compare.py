"""Compares two benchmarks of the same prompts: which differences exceed sampling noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from space_cli.bench.record import BenchRecord, Sample
from space_cli.bench.results import interval, place, rate
from space_cli.errors import UsageProblem, first_invalid, opening

_WHERE = (
    *("space", "commit", "torch", "transformers", "processor", "threads", "gpu"),
    *("dtype", "quantization", "weights", "engine"),
)
_HOW = ("model", "draft_model", "max_new_tokens", "sampling", "candidates")


@dataclass(frozen=True, slots=True)
class Change:
    """One method on one suite, before and after.

    Attributes:
        prompts: answered in both.
        tokens_per_second: before and after.
        speedup: over AR's in the same run, before and after; None without AR.
        ratio: of the speedups, after over before; without AR, of the tokens per second.
        interval: 95 % of that ratio for resampled prompts lie in it; None for too few prompts.
        tokens_per_step: before and after.
        quality: before and after; None where one was not scored.
        other_answers: how many answers are not token for token what they were.
    """

    suite: str
    method: str
    prompts: int
    tokens_per_second: tuple[float, float]
    speedup: tuple[float, float] | None
    ratio: float
    interval: tuple[float, float] | None
    tokens_per_step: tuple[float, float]
    quality: tuple[float, float] | None
    other_answers: int

    @property
    def verdict(self) -> str:
        """The verdict: faster or slower only if the 95 % interval excludes 1."""
        if self.speedup is None:
            return "not judged"
        if self.interval is None:
            return "too few prompts to tell"
        low, high = self.interval
        return "faster" if low > 1 else "slower" if high < 1 else "no change beyond noise"


def read_report(file: Path) -> BenchRecord:
    """Return a benchmark's record.

    Raises:
        UsageProblem: it cannot be read, or is none.
    """
    with opening(file):
        content = file.read_bytes()
    try:
        return BenchRecord.model_validate(json.loads(content))
    except ValidationError as error:
        reason = f"not a record of this version's `space bench --json`: {first_invalid(error)}"
        raise UsageProblem(f"{file}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise UsageProblem(f"{file}: not a record of `space bench --json`: {error}") from error


def changes(before: BenchRecord, after: BenchRecord) -> list[Change]:
    """Return the change of each method on each suite that both records have."""
    sides = [_by_method(report.samples) for report in (before, after)]
    return [_change(*key, sides) for key in sides[0] if key in sides[1] and sides[0][key].keys() & sides[1][key].keys()]


def differing(before: BenchRecord, after: BenchRecord) -> list[tuple[str, object, object]]:
    """Return the settings and machine facts in which two runs differ: name, before, after."""
    one, other = before.environment | before.settings, after.environment | after.settings
    return [(name, one.get(name), other.get(name)) for name in (*_WHERE, *_HOW) if one.get(name) != other.get(name)]


_Samples = dict[tuple[str, int, int, int], Sample]


def _by_method(samples: Sequence[Sample]) -> dict[tuple[str, str], _Samples]:
    grouped: dict[tuple[str, str], _Samples] = {}
    for sample in samples:
        # the same id with another prompt is another task
        key = (*place(sample), sample.prompt_tokens)
        grouped.setdefault((sample.suite, sample.method), {})[key] = sample
    return grouped


def _change(suite: str, method: str, sides: list[dict[tuple[str, str], _Samples]]) -> Change:
    own = _shared([side[suite, method] for side in sides])
    plain = _shared([side.get((suite, "ar"), {}) for side in sides])
    if method == "ar" or [place(sample) for sample in own[0]] != [place(sample) for sample in plain[0]]:
        # without AR there is nothing to cancel machine load with
        plain = [own[0][:0], own[0][:0]]
    over, under = ([own[1], plain[0]], [own[0], plain[1]]) if plain[0] else ([own[1]], [own[0]])
    rates = rate(own[0]), rate(own[1])
    speedups = (rates[0] / rate(plain[0]), rates[1] / rate(plain[1])) if plain[0] else None
    scores = [[sample.score for sample in samples if sample.score is not None] for samples in own]
    return Change(
        suite=suite,
        method=method,
        prompts=len(own[0]),
        tokens_per_second=rates,
        speedup=speedups,
        ratio=rates[1] / rates[0] if speedups is None else speedups[1] / speedups[0],
        interval=interval(over, under),
        tokens_per_step=(_per_step(own[0]), _per_step(own[1])),
        quality=(sum(scores[0]) / len(scores[0]), sum(scores[1]) / len(scores[1])) if all(scores) else None,
        other_answers=sum(one.token_ids != other.token_ids for one, other in zip(*own, strict=True)),
    )


def _shared(sides: list[_Samples]) -> list[list[Sample]]:
    """Return the samples of the places that both have, in the same order."""
    return [[side[key] for key in sides[0] if key in sides[1]] for side in sides]


def _per_step(samples: Sequence[Sample]) -> float:
    return sum(sample.tokens for sample in samples) / sum(sample.steps for sample in samples)

"""Sweeps over k: names of their methods, parsing of `--sweep`, and the fastest k."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from space_cli.errors import UsageProblem

if TYPE_CHECKING:
    from space_cli.bench.record import Result


def sweep_method(k: int) -> str:
    """Return the name of the method that drafts a chain of k candidates."""
    return f"space-k{k}"


def sweep_k(method: str) -> int | None:
    """Return the k in a method's name, None for a method of no sweep.

    >>> sweep_k("space-k5"), sweep_k("space")
    (5, None)
    """
    found = re.fullmatch(r"space-k(\d+)", method)
    return int(found[1]) if found else None


def parse_sweep(sweep: str) -> list[int]:
    """Return the k of `candidates=1..8` or `candidates=1,2,5`, each once.

    Raises:
        UsageProblem: it is neither.
    """
    name, _, values = sweep.partition("=")
    if name == "candidates":
        if match := re.fullmatch(r"(\d{1,3})\.\.(\d{1,3})", values):
            sizes = list(range(int(match[1]), int(match[2]) + 1))
        else:
            sizes = [int(value) for value in values.split(",") if re.fullmatch(r"\d{1,3}", value)]
        if sizes and min(sizes) >= 1 and len(sizes) >= values.count(",") + 1:
            return list(dict.fromkeys(sizes))
    raise UsageProblem(f"--sweep {sweep}: not understood", hint="give candidates=1..8 or candidates=1,2,5")


def fastest_k(results: Iterable[Result]) -> int | None:
    """Return the k with the most tokens per second over all suites in `results`, None without a sweep.

    Tokens per second are all tokens over all seconds, as everywhere; rows of categories and rows without repetitive
    answers count the same answers a second time and are passed over. Of equals the smaller k.
    """
    totals: dict[int, list[float]] = {}
    for result in results:
        k = sweep_k(result.method)
        if k is not None and result.is_whole_suite:
            total = totals.setdefault(k, [0.0, 0.0])
            total[0] += result.tokens
            total[1] += result.seconds
    return max(sorted(totals), key=lambda k: totals[k][0] / totals[k][1], default=None)

"""A benchmark in sentences: the worst result as plainly as the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from space_cli.bench.sweep import fastest_k, sweep_method
from space_cli.report.plots import is_sweep, speedup_of, whole_suites

if TYPE_CHECKING:
    from space_cli.bench.record import BenchRecord, Result

_MANY = 1 / 3
_FEW = 5

Name = Callable[[str], str]
"""Sets the name of a suite, category or method, as `page.code` does in Markdown."""


def subject(report: BenchRecord) -> str | None:
    """Return the method that a report is about: a sweep's fastest k, else space, else the first beside ar."""
    methods = list(dict.fromkeys(result.method for result in report.results))
    if is_sweep(report):
        k = fastest_k(report.results)
        return None if k is None else sweep_method(k)
    others = [name for name in methods if name != "ar"]
    return "space" if "space" in others else next(iter([*others, *methods]), None)


def headline(report: BenchRecord, *, name: Name = str) -> str:
    """Return the run in one sentence."""
    method = subject(report)
    rows = [row for row in whole_suites(report.results) if row.method == method]
    if method is None or not rows:
        return "Nothing was measured"
    timed = [row for row in rows if row.speedup is not None]
    if not timed or method == "ar":
        row = rows[0]
        return (
            f"{name(method)} reaches {row.tokens_per_second:.1f} tokens per second on {name(row.suite)},"
            f" {row.tokens_per_step:.2f} per step; no speedup without another method and ar"
        )
    if len(timed) == 1:
        speed = f"{timed[0].speedup:.2f} times as fast as ar on {name(timed[0].suite)}{_beside(report, timed[0])}"
    else:
        low, high = min(timed, key=speedup_of), max(timed, key=speedup_of)
        speed = (
            f"{low.speedup:.2f} ({name(low.suite)}) to {high.speedup:.2f} ({name(high.suite)}) times as fast as ar on"
            f" {len(timed)} suites"
        )
    return f"{name(method)} is {speed}{_equal(rows)}"


def _bounds(row: Result) -> tuple[float, float]:
    return row.speedup_interval or (speedup_of(row), speedup_of(row))


def _holds_one(row: Result) -> bool:
    low, high = _bounds(row)
    return low < 1 < high


def _beside(report: BenchRecord, row: Result) -> str:
    """Return the figure without repetitive answers, if there is one."""
    for other in report.results:
        same = (other.suite, other.method, other.category) == (row.suite, row.method, None)
        if same and other.outputs != "all" and other.speedup is not None:
            return f", {other.speedup:.2f} without repetitive answers"
    return ""


def _equal(rows: list[Result]) -> str:
    compared = [row for row in rows if row.identical_prompts is not None]
    answers = sum(row.prompts for row in compared)
    differ = answers - sum(row.identical_prompts or 0 for row in compared)
    if not compared:
        return ""
    return f"; {differ} of {answers} answers differ from ar's" if differ else "; every answer identical"


def remarks(report: BenchRecord, *, name: Name = str) -> Iterator[str]:
    """Yield remarks on the headline as Markdown, one paragraph each."""
    method = subject(report)
    rows = [row for row in report.results if row.method == method and row.speedup is not None and method != "ar"]
    if rows:
        best, worst = max(rows, key=speedup_of), min(rows, key=speedup_of)
        if best is not worst:
            yield f"Best: {_figure(best, name)}. Worst: {_figure(worst, name)}."
        elif _bounds(worst)[1] < 1:
            yield "That is slower than ar."
        unsure = [row for row in rows if row.is_whole_suite and _holds_one(row)]
        if unsure:
            places = ", ".join("{} ({:.2f} to {:.2f})".format(name(row.suite), *_bounds(row)) for row in unsure)
            yield f"Too close to call, since the 95 % interval holds 1: {places}."
    if report.settings.get("masks_per_group") == 0 and method == "space":
        yield f"{name(report.settings['model'])} has no masks: all that space guessed was copied from the text so far."
    yield from _faster(report, method, name)
    yield from _warnings(report)


def _figure(row: Result, name: Name) -> str:
    category = f", category {name(row.category)}" if row.category is not None else ""
    outputs = "" if row.outputs == "all" else ", without repetitive answers"
    slower = ", slower than ar" if speedup_of(row) < 1 else ""
    return f"{row.speedup:.2f} on {name(row.suite)}{category}{outputs}{slower}"


def _faster(report: BenchRecord, method: str | None, name: Name) -> Iterator[str]:
    """Yield where another method was faster than the report's subject."""
    if is_sweep(report):
        return
    beaten = []
    for suite in dict.fromkeys(row.suite for row in whole_suites(report.results)):
        rows = [row for row in whole_suites(report.results) if row.suite == suite and row.speedup is not None]
        first = max(rows, key=speedup_of, default=None)
        if first is not None and first.method not in ("ar", method):
            beaten.append(f"{name(first.method)} with {first.speedup:.2f} on {name(suite)}")
    if beaten:
        yield f"Faster in this run: {', '.join(beaten)}."


def _warnings(report: BenchRecord) -> Iterator[str]:
    reference = [sample for sample in report.samples if sample.method == "ar"]
    loops = sum(sample.repetitive for sample in reference)
    if reference and loops >= _MANY * len(reference):
        yield (
            f"> {loops} of {len(reference)} answers of ar repeat themselves, as those of weak models do. Repetition is"
            " easy to guess, so the figures over all answers flatter every method that guesses: read those without"
            " repetitive answers."
        )
    fewest = min((row.prompts for row in whole_suites(report.results)), default=_FEW)
    if fewest < _FEW:
        yield f"> Only {fewest} answers a method on the smallest suite: too few for an interval, and for a verdict."

"""Shows the results of finished runs: records and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from space_cli.bench.sweep import fastest_k, sweep_method
from space_cli.cli.console import err, is_screen, out, plain, table
from space_cli.core.stream import Parts
from space_cli.report.columns import between, cells, terminal_columns, times
from space_cli.report.wording import (
    by_place,
    evidence,
    heading,
    run_settings,
    sides,
    verdict,
    verification_settings,
    without_masks,
)

if TYPE_CHECKING:
    from space_cli.bench.compare import Change
    from space_cli.bench.profile import Profile
    from space_cli.bench.record import BenchRecord, Result, Sample
    from space_cli.verify.record import Divergence, Row, Verification

_PLACES_SHOWN = 8
_ROUNDING = (
    "Half precision rounds a token differently in calls of another shape; --dtype float32 is exact, and"
    " `space verify-lossless` distinguishes rounding from faults."
)


def show_bench(report: BenchRecord, done: str, *, to_stderr: bool) -> None:
    """Print the tables of a benchmark.

    Args:
        report: what was measured.
        done: how far it got, for a run cut short.
        to_stderr: leave standard output alone.
    """
    console = _console(to_stderr=to_stderr)
    if not report.complete:
        console.print(f"Interrupted after {done}.")
    for part in _tables(report.results):
        console.print(part)
    if report.profile is not None:
        for part in (*_split(report.samples), *_costs(report.profile)):
            console.print(part)
    console.print()
    k = fastest_k(report.results)
    if k is not None:
        best = next(each for each in report.results if each.method == sweep_method(k) and each.is_whole_suite)
        console.print(plain(f"Fastest here: k = {k} ({times(best.speedup)} on {best.suite})"), soft_wrap=True)
    console.print(_closing(report), soft_wrap=True)
    if report.environment["dtype"] != "float32" and any(result.identical is False for result in report.results):
        console.print(_ROUNDING, style="dim", soft_wrap=True)


def _console(*, to_stderr: bool) -> Console:
    console = err() if to_stderr else out()
    if not is_screen(console):
        # without a terminal there is no width: a wrapped table is hard to read and to parse
        console.width = max(console.width, 200)
    return console


def _tables(results: list[Result]) -> Iterator[Text | Table]:
    """Yield a heading and a table per suite and choice of outputs, and one of speedups by category."""
    for suite in dict.fromkeys(result.suite for result in results):
        of_suite = [result for result in results if result.suite == suite]
        for outputs in dict.fromkeys(result.outputs for result in of_suite):
            rows = [result for result in of_suite if result.outputs == outputs and result.category is None]
            yield plain(f"\n{suite}, {outputs} outputs, {_counted(rows[0].prompts, 'answer')}", style="bold")
            yield _results(rows)
            for row in rows:
                if row.pass_at_k is not None:
                    chances = "  ".join(f"pass@{k} {chance:.1%}" for k, chance in row.pass_at_k.items())
                    yield plain(f"{row.method}: {chances}", style="dim")
        by_category = [result for result in of_suite if result.category is not None]
        if by_category:
            yield plain(f"\n{suite} by category: speedup, tokens per step", style="bold")
            yield _categories(by_category)


def _categories(results: list[Result]) -> Table:
    methods = list(dict.fromkeys(result.method for result in results))
    shown = table("category", "answers", *methods)
    for category in dict.fromkeys(result.category for result in results):
        row = {result.method: result for result in results if result.category == category}
        cells = [
            f"{times(row[name].speedup)} {row[name].tokens_per_step:.2f}" if name in row else "-" for name in methods
        ]
        shown.add_row(plain(str(category)), str(next(iter(row.values())).prompts), *cells)
    return shown


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _split(samples: list[Sample]) -> Iterator[Text | Table]:
    """Yield the breakdown of a step's time by method."""
    shown = table("method", "ms/step", "prompt", "model", "choosing", "cache", "drafting", "other", "outside the model")
    for method in dict.fromkeys(sample.method for sample in samples if sample.parts is not None):
        own = [sample for sample in samples if sample.method == method and sample.parts is not None]
        steps = sum(sample.steps for sample in own)
        parts = {name: sum(each.parts[name] for each in own if each.parts) / steps for name in Parts._fields}
        whole = sum(sample.seconds for sample in own) / steps
        # the first step also computes the prompt
        later = [(each.seconds - each.first_step_seconds) / (each.steps - 1) for each in own if each.steps > 1]
        prompt = (
            sum(sample.first_step_seconds for sample in own) / steps
            - statistics.median(later or [0]) * len(own) / steps
        )
        beside = whole - prompt - parts["model"]
        row = (whole, prompt, *parts.values(), beside - sum(parts.values()) + parts["model"])
        outside = f"{beside / (whole - prompt):.0%}"
        shown.add_row(plain(method), *(f"{seconds * 1e3:.3f}" for seconds in row), outside)
    yield plain("\nA step, in milliseconds", style="bold")
    yield shown


def _costs(profile: Profile) -> Iterator[Text | Table]:
    """Yield the cost of a model call by slots and prefix length."""
    lengths = list(profile.seconds)
    shown = table("slots", *(f"prefix {length}" for length in lengths), "over 1 slot", "GB/s", "of roofline", "")
    first = profile.seconds[lengths[0]]
    most = max(first.values())
    for slots, seconds in first.items():
        row = [f"{profile.seconds[length][slots] * 1e3:.2f}" for length in lengths]
        rate, roofline = profile.weight_bytes / seconds / 1e9, profile.roofline_seconds / seconds
        bar = "█" * max(1, round(24 * seconds / most))
        shown.add_row(str(slots), *row, f"{seconds / first[1]:.2f}", f"{rate:.1f}", f"{roofline:.0%}", bar)
    yield plain("\nA model call, in milliseconds", style="bold")
    yield shown
    yield plain(
        f"{profile.weight_bytes / 1e6:.1f} MB of weights at {profile.bytes_per_second / 1e9:.1f} GB/s, as memory is"
        f" read here: {profile.roofline_seconds * 1e3:.2f} ms at best; weights that fit a cache can be read faster",
        style="dim",
    )


def _results(results: list[Result]) -> Table:
    *columns, last = terminal_columns(results)
    shown = table(*(column.heading for column in columns))
    shown.add_column(last.heading, no_wrap=True)
    for result in results:
        shown.add_row(*cells([*columns, last], result))
    return shown


def _closing(report: BenchRecord) -> Text:
    candidates = report.settings["candidates"]
    k = [f"k = {candidates}"] if candidates else []
    line = " · ".join([*run_settings(report), *k, "identical: token for token the answer of ar"])
    return plain("\n".join([line, *without_masks(report.settings)]), style="dim")


def show_changes(changes: list[Change], differing: list[tuple[str, object, object]]) -> None:
    """Print the changes between two runs."""
    console = _console(to_stderr=False)
    for suite in dict.fromkeys(change.suite for change in changes):
        of_suite = [change for change in changes if change.suite == suite]
        console.print(plain(f"\n{suite}, {_counted(of_suite[0].prompts, 'answer')} in both", style="bold"))
        judged = any(change.quality is not None for change in of_suite)
        shown = table("method", "tok/s", "tok/step", "speedup", "change", "95 %", *(["quality"] if judged else []))
        for title in ("verdict", "other answers"):
            shown.add_column(title)
        for change in of_suite:
            shown.add_row(
                plain(change.method),
                "{:.1f} > {:.1f}".format(*change.tokens_per_second),
                "{:.2f} > {:.2f}".format(*change.tokens_per_step),
                "-" if change.speedup is None else "{:.2f} > {:.2f}".format(*change.speedup),
                times(change.ratio),
                between(change.interval),
                *([_quality(change)] if judged else []),
                change.verdict,
                f"{change.other_answers} of {change.prompts}",
            )
        console.print(shown)
    console.print()
    for name, one, other in differing:
        console.print(plain(f"{name}: {one} before, {other} after"), soft_wrap=True)
    legend = (
        "change: ratio of the two speedups over ar, so machine load cancels; for ar itself, ratio of tokens per second,"
        " which load does change: not judged. 95 %: bootstrap interval over prompts."
    )
    console.print(legend, style="dim", soft_wrap=True)


def _quality(change: Change) -> str:
    return "-" if change.quality is None else "{:.1%} > {:.1%}".format(*change.quality)


def show_verification(record: Verification, done: str, *, to_stderr: bool) -> None:
    """Print the verdict of a verification and its evidence.

    Args:
        record: what was found.
        done: how far it got, for a run cut short.
        to_stderr: leave standard output alone.
    """
    console = _console(to_stderr=to_stderr)
    # lines wrap between words in a terminal, and not at all elsewhere
    fold = not is_screen(console)
    if not record.complete:
        console.print(f"Interrupted after {done}.")
    places = by_place(record.divergences)
    for place in places[:_PLACES_SHOWN]:
        console.print(_place(place), soft_wrap=fold)
    if len(places) > _PLACES_SHOWN:
        console.print(f"... and {len(places) - _PLACES_SHOWN} more places; --json or --report has them all.\n")
    for suite in dict.fromkeys(row.suite for row in record.rows):
        console.print(plain(suite, style="bold"))
        console.print(_comparisons([row for row in record.rows if row.suite == suite]))
        console.print()
    for line in evidence(record):
        console.print(plain(line), soft_wrap=fold)
    console.print(plain(" · ".join(verification_settings(record)), style="dim"), soft_wrap=fold)
    console.print(Text(verdict(record), style="bold green" if record.lossless else "bold red"), soft_wrap=fold)


def _comparisons(rows: list[Row]) -> Table:
    shown = table("against", "answers", "identical", "ties", "violations")
    for row in rows:
        shown.add_row(row.against, *map(str, (row.answers, row.identical, row.ties, row.violations)))
    return shown


def _place(place: list[Divergence]) -> Text:
    found = place[0]
    expected = "causal call" if found.against == "drafts" else sides(place)
    wide = max(len(expected), len("space"))
    return Text.assemble(
        (f"{found.verdict} ", "yellow" if found.verdict == "tie" else "bold red"),
        plain(f"{heading(place)}\n"),
        plain(f"  {'after':<{wide}} {_one_line(found.context)}\n", style="dim"),
        plain(f"  {expected:<{wide}} {_side(found.expected, found.expected_text)}\n"),
        plain(f"  {'space':<{wide}} {_side(found.got, found.got_text)}\n"),
        plain(f"  {found.reason}\n"),
    )


def _side(token: int | None, text: str) -> str:
    return "(ended)" if token is None else f"{text!r} (id {token})"


def _one_line(text: str) -> str:
    return "..." + repr(text[-60:])[1:-1]

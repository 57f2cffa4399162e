"""Tables of finished runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from space_cli.cli.console import err, out, plain

if TYPE_CHECKING:
    from space_cli.bench.report import Report, Result

_ROUNDING = "Half precision rounds a position differently in calls of different shape; --dtype float32 is exact."


def show_bench(report: Report, done: str, *, to_stderr: bool) -> None:
    """Print the tables of a benchmark.

    Args:
        report: what was measured.
        done: how far it got, for a run cut short.
        to_stderr: leave standard output alone.
    """
    console = err() if to_stderr else out()
    if not console.is_terminal:
        # without a terminal there is no width to keep to: a table cut at 80 columns would lose figures
        console.width = max(console.width, 100)
    if not report.complete:
        console.print(f"Interrupted after {done}.")
    for part in _tables(report.results):
        console.print(part)
    console.print()
    console.print(_closing(report), soft_wrap=True)
    if report.environment["dtype"] != "float32" and any(result.identical is False for result in report.results):
        console.print(_ROUNDING, style="dim", soft_wrap=True)


def _tables(results: list[Result]) -> Iterator[Text | Table]:
    """Yield a heading and a table per suite and choice of outputs."""
    for group in dict.fromkeys((result.suite, result.outputs) for result in results):
        suite, outputs = group
        yield plain(f"\n{suite}, {outputs} outputs", style="bold")
        yield _table([result for result in results if (result.suite, result.outputs) == group])


def _table(results: list[Result]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("method")
    for heading in ("prompts", "tokens", "steps", "tok/step", "tok/s", "speedup"):
        table.add_column(heading, justify="right")
    table.add_column("identical", no_wrap=True)
    for result in results:
        table.add_row(
            result.method,
            str(result.prompts),
            str(result.tokens),
            str(result.steps),
            f"{result.tokens_per_step:.2f}",
            f"{result.tokens_per_second:.1f}",
            "-" if result.speedup is None else f"{result.speedup:.2f}x",
            _identical(result),
        )
    return table


def _identical(result: Result) -> str:
    if result.identical is None:
        return "-"
    return "yes" if result.identical else f"no ({result.identical_prompts} of {result.prompts})"


def _closing(report: Report) -> Text:
    settings, where = report.settings, report.environment
    sampling = settings["sampling"]
    mode = f"temperature {sampling['temperature']:g}, seed {sampling['seed']}" if sampling["temperature"] else "greedy"
    parts = [
        str(settings["model"]),
        where["dtype"],
        where["device"],
        f"{where['threads']} threads",
        mode,
        f"{settings['max_new_tokens']} new tokens",
        *([f"k = {settings['candidates']}"] if settings["candidates"] else []),
        "identical: token for token the answer of ar",
    ]
    return plain(" · ".join(parts), style="dim")

"""The columns of a row of results, each written once; the terminal and a report each choose some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from space_cli.bench.record import Result


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its heading, and the cell of a row."""

    heading: str
    cell: Callable[[Result], str]


def identical(result: Result) -> str:
    """Return whether a method's answers are those of ar."""
    if result.identical is None:
        return "-"
    return "yes" if result.identical else f"no ({result.identical_prompts} of {result.prompts})"


def times(ratio: float | None) -> str:
    """Return a speedup as text."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def between(bounds: tuple[float, float] | None) -> str:
    """Return an interval as text."""
    return "-" if bounds is None else f"{bounds[0]:.2f}-{bounds[1]:.2f}"


def speedup(result: Result) -> str:
    """Return a speedup with its interval; ar has none over itself."""
    if result.speedup is None:
        return "-"
    if result.speedup_interval is None or result.method == "ar":
        return f"{result.speedup:.2f}"
    return "{:.2f} [{:.2f}, {:.2f}]".format(result.speedup, *result.speedup_interval)


def quality(result: Result, baseline: Result | None = None) -> str:
    """Return a score, with that of `baseline` in brackets beside it."""
    if result.quality is None:
        return "-"
    beside = f" ({baseline.quality:.3f})" if baseline is not None and baseline.quality is not None else ""
    return f"{result.quality:.3f}{beside if result is not baseline else ''}"


_METHOD = Column("method", lambda row: row.method)
_TOKENS = Column("tokens", lambda row: str(row.tokens))
_TOKENS_PER_STEP = Column("tok/step", lambda row: f"{row.tokens_per_step:.2f}")
_TOKENS_PER_SECOND = Column("tok/s", lambda row: f"{row.tokens_per_second:.1f}")
_IDENTICAL = Column("identical", identical)


def terminal_columns(rows: Sequence[Result]) -> list[Column]:
    """Return the columns of a table in the terminal."""
    metric = _metric(rows)
    scored = Column(metric or "", lambda row: "-" if row.quality is None else f"{row.quality:.1%}")
    return [
        _METHOD,
        _TOKENS,
        _TOKENS_PER_STEP,
        _TOKENS_PER_SECOND,
        Column("speedup", lambda row: times(row.speedup)),
        Column("95 %", lambda row: between(row.speedup_interval if row.method != "ar" else None)),
        Column("first ms", lambda row: f"{row.first_token_seconds * 1e3:.0f}"),
        *([scored] if metric is not None else []),
        _IDENTICAL,
    ]


def page_columns(rows: Sequence[Result]) -> list[Column]:
    """Return the columns of a table in a report: the two sides of a speedup in one, and more figures."""
    metric = _metric(rows)
    baseline = next((row for row in rows if row.method == "ar"), None)
    scored = [Column(metric, lambda row: quality(row, baseline))] if metric is not None else []
    return [
        _METHOD,
        Column("speedup", speedup),
        *scored,
        *[_pass_at(k) for k in _tries(rows)],
        _IDENTICAL,
        _TOKENS_PER_STEP,
        _TOKENS_PER_SECOND,
        Column(
            "decode",
            lambda row: "-" if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:.1f}",
        ),
        Column("first", lambda row: f"{row.first_token_seconds * 1e3:.0f} ms"),
        Column("prompts", lambda row: str(row.prompts)),
        _TOKENS,
        Column("steps", lambda row: str(row.steps)),
    ]


def cells(columns: Sequence[Column], row: Result) -> list[str]:
    """Return the cells of a row."""
    return [column.cell(row) for column in columns]


def _metric(rows: Sequence[Result]) -> str | None:
    return next((row.metric for row in rows if row.metric is not None), None)


def _pass_at(k: int) -> Column:
    return Column(f"pass@{k}", lambda row: f"{row.pass_at_k[k]:.3f}" if row.pass_at_k else "-")


def _tries(rows: Sequence[Result]) -> list[int]:
    """Return the k above 1 for which rows have a pass@k: the powers of two, and the last."""
    ks = [k for row in rows for k in (row.pass_at_k or {})]
    return [k for k in dict.fromkeys(ks) if k > 1 and (k & (k - 1) == 0 or k == max(ks))]

"""The report of `space bench`: headline, tables, plots, and answers step by step."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from space_cli.report.columns import cells, page_columns, quality, speedup
from space_cli.report.headline import headline, remarks, subject
from space_cli.report.page import Folded, Group, Html, Part, code, escaped, fenced, table
from space_cli.report.plots import plots
from space_cli.report.wording import run_settings

if TYPE_CHECKING:
    from space_cli.bench.record import BenchRecord, Result, Sample
    from space_cli.report.drawing import Plot

_OUTPUTS = {"all": "All answers", "without repetitive": "Without the prompts on which ar repeats itself"}
_LEGEND = (
    "tok/step: tokens per model call. tok/s: tokens over seconds, prompt included; decode: behind the first step."
    " first: median milliseconds to the first token. speedup: tok/s over that of ar, with the 95 % interval over"
    " resampled prompts. identical: token for token the answer of ar."
)
_SHADES = 3


def bench_page(report: BenchRecord) -> list[Part]:
    """Return a benchmark as the parts of a report."""
    parts: list[Part] = [
        f"# {headline(report, name=code)}",
        "" if report.complete else "> The run was cut short; this is what was done by then.",
        *remarks(report, name=code),
        escaped(" · ".join(run_settings(report))),
        *_results(report.results),
        _LEGEND,
        *_plots(report),
        *_answers(report),
        "## How it was made",
        *_made(report),
    ]
    return [part for part in parts if part]


def _results(results: Sequence[Result]) -> list[Part]:
    parts: list[Part] = ["## Results"]
    for suite in dict.fromkeys(result.suite for result in results):
        own = [result for result in results if result.suite == suite]
        parts.append(f"### {code(suite)}")
        for outputs, name in _OUTPUTS.items():
            rows = [result for result in own if result.outputs == outputs and result.category is None]
            if rows:
                parts += [f"{name}:", _result_table(rows)]
        parts += _categories([result for result in own if result.category is not None])
    return parts


def _result_table(rows: Sequence[Result]) -> str:
    columns = page_columns(rows)
    return table([each.heading for each in columns], [cells(columns, row) for row in rows], figures=True)


def _categories(results: Sequence[Result]) -> list[Part]:
    """Return speedups, and scores where there are any, by category and method."""
    if not results:
        return []
    parts: list[Part] = ["Speedup by category, all answers:", _by_category(results, speedup, without="ar")]
    metric = next((result.metric for result in results if result.metric is not None), None)
    if metric is not None:
        parts += [f"{escaped(metric)} by category:", _by_category(results, quality)]
    return parts


def _by_category(results: Sequence[Result], cell: Any, *, without: str = "") -> str:
    methods = [name for name in dict.fromkeys(result.method for result in results) if name != without]
    cells = {(result.category, result.method): cell(result) for result in results}
    prompts = {result.category: result.prompts for result in results}
    rows = [
        [code(category or ""), count, *(cells.get((category, method), "-") for method in methods)]
        for category, count in prompts.items()
    ]
    return table(["category", "prompts", *methods], rows, figures=True)


def _plots(report: BenchRecord) -> list[Part]:
    drawn = plots(report)
    if not drawn:
        return []
    can_draw = find_spec("matplotlib") is not None
    return [
        "## Where the speed comes from",
        *([] if can_draw else [Html("figure.html", {})]),
        Group("plots", [Group("plot", _figure(plot, can_draw=can_draw)) for plot in drawn]),
    ]


def _figure(plot: Plot, *, can_draw: bool) -> list[Part]:
    from space_cli.report.drawing import inline_svg

    rows = [[first if first.isdigit() else code(first), *rest] for first, *rest in plot.rows]
    figures = Folded(f"{plot.title}, in figures", [table(plot.headings, rows, figures=True)])
    if not can_draw:
        return [figures]
    return [Html("figure.html", {"title": plot.title, "svg": inline_svg(plot), "caption": plot.caption}), figures]


def _answers(report: BenchRecord) -> list[Part]:
    method = subject(report)
    own = [sample for sample in report.samples if sample.method == method and sample.text_by_step]
    if not own:
        return []
    speedups = _prompt_speedups(report.samples, own)
    suites = {}
    for suite in dict.fromkeys(sample.suite for sample in own):
        picked = _picked([sample for sample in own if sample.suite == suite], speedups)
        suites[suite] = [
            {"summary": _summary(why, sample, speedups.get(id(sample))), "steps": _steps(sample)}
            for why, sample in picked
        ]
    return [Html("answers.html", {"method": method, "shades": _SHADES, "suites": suites})]


def _prompt_speedups(samples: Sequence[Sample], own: Sequence[Sample]) -> dict[int, float]:
    """Return speedups by the samples' ids, of those that ar answered too."""
    baseline = {_place(sample): sample.tokens / sample.seconds for sample in samples if _is_timed_ar(sample)}
    return {
        id(sample): sample.tokens / sample.seconds / rate
        for sample in own
        if sample.seconds and (rate := baseline.get(_place(sample)))
    }


def _is_timed_ar(sample: Sample) -> bool:
    return sample.method == "ar" and sample.seconds > 0


def _place(sample: Sample) -> tuple[str, str, int, int]:
    return sample.suite, sample.task_id, sample.turn, sample.seed


def _picked(own: Sequence[Sample], speedups: Mapping[int, float]) -> list[tuple[str, Sample]]:
    """Return the first sample and those of best, median and worst speedup, each once, with why."""
    whys: dict[int, list[str]] = {id(own[0]): ["first"]}
    ranked = sorted((each for each in own if id(each) in speedups), key=lambda each: -speedups[id(each)])
    if len(ranked) > 1:
        for why, sample in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
            whys.setdefault(id(sample), []).append(why)
    by_id = {id(sample): sample for sample in own}
    return [(", ".join(why), by_id[found]) for found, why in whys.items()]


def _summary(why: str, sample: Sample, speedup: float | None) -> str:
    """Return the line that opens an answer."""
    named = [sample.task_id]
    named += [f"turn {sample.turn + 1}"] if sample.turn else []
    named += [f"seed {sample.seed}"] if sample.seed else []
    facts = [f"{sample.tokens / sample.steps:.2f} tokens per step"] if sample.steps else []
    if speedup is not None:
        facts.insert(0, f"{speedup:.2f} times as fast as ar")
    if sample.identical is not None:
        facts.append("identical" if sample.identical else "NOT identical")
    facts += ["repetitive"] if sample.repetitive else []
    facts += [sample.outcome] if sample.outcome else []
    return " ".join(f"{', '.join(named)} ({why}): {', '.join(facts)}".split())


def _steps(sample: Sample) -> list[dict[str, Any]]:
    """Return the text of each step, and what was rejected there."""
    rejected = [*sample.rejected_by_step, *[[]] * len(sample.text_by_step)]
    counts = [*sample.tokens_by_step, *[0] * len(sample.text_by_step)]
    return [
        {
            "text": text,
            "title": f"{count} {'token' if count == 1 else 'tokens'}",
            "rejected": [_on_one_line(guess) for guess in wrong],
        }
        for text, wrong, count in zip(sample.text_by_step, rejected, counts, strict=False)
    ]


def _on_one_line(text: str) -> str:
    """Return a rejected guess on one line, spaces at its ends visible."""
    shown = text.replace("\n", "↵").replace("\t", "⇥")
    return (shown if shown.strip() else "␣" * len(shown)) or "∅"


def _made(report: BenchRecord) -> list[Part]:
    settings = dict(report.settings)
    command = settings.pop("command", None)
    parts: list[Part] = []
    if command:
        parts.append(fenced(command if isinstance(command, str) else shlex.join(map(str, command))))
    environment = {name: value for name, value in report.environment.items() if name != "step_costs"}
    for title, values in (("Settings", settings), ("Environment", environment)):
        rows = [(name, code(shown)) for name, shown in _flat(values)]
        parts.append(Folded(title, [table((title.lower(), ""), rows)]))
    return parts


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return settings by name, those within others with a dot; what was not set is left out."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{name}.")
        elif value is not None:
            rows.append(
                (f"{before}{name}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
            )
    return rows

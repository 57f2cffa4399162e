"""The report of `space bench`: what the run shows in a sentence, tables, plots, and answers step by step."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from space_cli.cli.console import visible
from space_cli.cli.headline import headline, remarks, subject
from space_cli.cli.page import Folded, Group, Html, Part, code, escaped, fenced, table
from space_cli.cli.plots import plots
from space_cli.cli.tables import how, identical

if TYPE_CHECKING:
    from space_cli.bench.record import BenchRecord, Result, Sample
    from space_cli.cli.drawing import Plot

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
        escaped(" · ".join(how(report))),
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
    metric = next((row.metric for row in rows if row.metric is not None), None)
    judged = [metric, *(f"pass@{k}" for k in _tries(rows))] if metric is not None else []
    rest = ("identical", "tok/step", "tok/s", "decode", "first", "prompts", "tokens", "steps")
    baseline = next((row for row in rows if row.method == "ar"), None)
    cells = [
        [
            row.method,
            _speedup(row),
            *([_quality(row, baseline)] if metric is not None else []),
            *(f"{row.pass_at_k[k]:.3f}" if row.pass_at_k else "-" for k in _tries(rows)),
            identical(row),
            f"{row.tokens_per_step:.2f}",
            f"{row.tokens_per_second:.1f}",
            "-" if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:.1f}",
            f"{row.first_token_seconds * 1e3:.0f} ms",
            row.prompts,
            row.tokens,
            row.steps,
        ]
        for row in rows
    ]
    return table(["method", "speedup", *judged, *rest], cells, figures=True)


def _tries(rows: Sequence[Result]) -> list[int]:
    """Return the k above 1 for which all rows have a pass@k: the powers of two, and the last."""
    ks = [k for row in rows for k in (row.pass_at_k or {})]
    return [k for k in dict.fromkeys(ks) if k > 1 and (k & (k - 1) == 0 or k == max(ks))]


def _speedup(row: Result) -> str:
    if row.speedup is None:
        return "-"
    if row.speedup_interval is None or row.method == "ar":
        return f"{row.speedup:.2f}"
    return "{:.2f} [{:.2f}, {:.2f}]".format(row.speedup, *row.speedup_interval)


def _quality(row: Result, baseline: Result | None) -> str:
    if row.quality is None:
        return "-"
    beside = f" ({baseline.quality:.3f})" if baseline is not None and baseline.quality is not None else ""
    return f"{row.quality:.3f}{beside if row is not baseline else ''}"


def _categories(results: Sequence[Result]) -> list[Part]:
    """Return speedups, and scores where there are any, by category and method."""
    if not results:
        return []
    parts: list[Part] = ["Speedup by category, all answers:", _by_category(results, _speedup, without="ar")]
    metric = next((result.metric for result in results if result.metric is not None), None)
    if metric is not None:
        parts += [f"{escaped(metric)} by category:", _by_category(results, lambda row: _quality(row, None))]
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
    missing = Html("<p>Plots need matplotlib: <code>pip install 'space-decoding[plot]'</code></p>\n")
    return [
        "## Where the speed comes from",
        *([] if can_draw else [missing]),
        Group("plots", [Group("plot", _figure(plot, can_draw=can_draw)) for plot in drawn]),
    ]


def _figure(plot: Plot, *, can_draw: bool) -> list[Part]:
    from space_cli.cli.drawing import inline_svg

    caption = f"<figcaption>{html.escape(visible(plot.caption))}</figcaption>"
    rows = [[first if first.isdigit() else code(first), *rest] for first, *rest in plot.rows]
    figures = Folded(f"{plot.title}, in figures", [table(plot.headings, rows, figures=True)])
    if not can_draw:
        return [figures]
    shown = f"<h3>{html.escape(plot.title)}</h3>\n<figure>{inline_svg(plot)}\n{caption}</figure>\n"
    return [Html(shown), figures]


def _answers(report: BenchRecord) -> list[Part]:
    method = subject(report)
    own = [sample for sample in report.samples if sample.method == method and sample.text_by_step]
    if not own:
        return []
    legend = "".join(f'<span class="step-{shade}">tokens of a step</span>' for shade in range(_SHADES))
    what = (
        f"<p>What <code>{html.escape(visible(method or ''))}</code> wrote, a shade for each model call:"
        f' <span class="answer">{legend}<del>rejected guess</del></span>. A guess is struck through behind the step in'
        " which the model wanted another token.</p>"
    )
    parts: list[Part] = [Html(f"<h2>Answers</h2>\n{what}\n")]
    speedups = _prompt_speedups(report.samples, own)
    for suite in dict.fromkeys(sample.suite for sample in own):
        picked = _picked([sample for sample in own if sample.suite == suite], speedups)
        parts.append(Html(f"<h3><code>{html.escape(visible(suite))}</code></h3>\n"))
        for number, (why, sample) in enumerate(picked):
            parts.append(_answer(why, sample, speedups.get(id(sample)), is_open=number == 0))
    return parts


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


def _answer(why: str, sample: Sample, speedup: float | None, *, is_open: bool) -> Html:
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
    summary = " ".join(f"{', '.join(named)} ({why}): {', '.join(facts)}".split())
    return Html(
        f"<details{' open' if is_open else ''}><summary>{html.escape(visible(summary))}</summary>\n"
        f'<pre class="answer" tabindex="0">{_steps(sample)}</pre></details>\n'
    )


def _steps(sample: Sample) -> str:
    """Return an answer with the tokens of each step in a shade, and behind them what was rejected there."""
    rejected = [*sample.rejected_by_step, *[[]] * len(sample.text_by_step)]
    counts = [*sample.tokens_by_step, *[0] * len(sample.text_by_step)]
    pieces = []
    for step, (text, wrong, count) in enumerate(zip(sample.text_by_step, rejected, counts, strict=False)):
        title = f"step {step + 1}: {count} {'token' if count == 1 else 'tokens'}"
        shown = html.escape(visible(text))
        pieces.append(f'<span class="step-{step % _SHADES}" title="{title}">{shown}</span>')
        pieces += [f'<del title="rejected in step {step + 1}">{_rejected(each)}</del>' for each in wrong]
    # a parser drops the first newline of a <pre>
    return "\n" + "".join(pieces)


def _rejected(text: str) -> str:
    """Return a rejected guess on one line, spaces at its ends visible."""
    shown = visible(text).replace("\n", "↵").replace("\t", "⇥")
    return html.escape(shown if shown.strip() else "␣" * len(shown)) or "∅"


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

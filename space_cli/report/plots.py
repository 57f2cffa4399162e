"""The plots of a benchmark: the figures of each, and how matplotlib draws it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from space_cli.bench.sweep import fastest_k, sweep_k
from space_cli.core.costs import ASSUMED_COSTS
from space_cli.report.drawing import GRID, INK, LEGEND_COLUMNS, PAPER, Plot, Style, label, legend, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from space_cli.bench.record import BenchRecord, Result


def plots(report: BenchRecord) -> list[Plot]:
    """Return the plots of a benchmark; one that would be empty is left out."""
    looks = styles(result.method for result in report.results if result.method != "ar")
    made = (
        _sweep(report.results) if is_sweep(report) else _speedups(report.results, looks),
        _step_tokens(report.results, looks),
        _acceptance(report.results, looks),
        _call_costs(report),
    )
    return [plot for plot in made if plot is not None]


def is_sweep(report: BenchRecord) -> bool:
    """Return whether the run is a sweep over k."""
    return bool(report.settings.get("sweep")) and any(sweep_k(each.method) is not None for each in report.results)


def _speedups(results: Sequence[Result], looks: dict[str, Style]) -> Plot | None:
    """Speedup of every method by suite and category."""
    shown = [result for result in results if result.method in looks and result.speedup is not None]
    if not shown:
        return None
    places = list(dict.fromkeys((result.suite, result.category) for result in shown))
    rows = [
        (_place_name(*place), result.outputs, result.method, f"{result.speedup:.2f}", _interval(result))
        for place in places
        for result in shown
        if (result.suite, result.category) == place
    ]
    return Plot(
        "speedup",
        "Speedup over AR",
        "Right of the line at 1 is faster than ar. Filled: all answers; hollow: without repetitive ones. Bars: 95 %"
        " interval.",
        ("suite", "answers", "method", "speedup", "95 % interval"),
        rows,
        1.1 + len(places) * (0.18 + 0.14 * len(looks)) + 0.2 * ((len(looks) + LEGEND_COLUMNS - 1) // LEGEND_COLUMNS),
        partial(_draw_speedups, shown, places, looks),
    )


def _draw_speedups(
    results: Sequence[Result],
    places: Sequence[tuple[str, str | None]],
    looks: dict[str, Style],
    figure: FigureBase,
) -> None:
    axes = figure.subplots()
    axes.axvline(1.0, color=INK, linewidth=1.2, linestyle="--")
    names = list(looks)
    for result in results:
        # each place has a band, each method a line in it, with the hollow marker just below the filled one
        offset = (names.index(result.method) + 0.5) / len(names) * 0.8 - 0.4
        hollow = result.outputs != "all"
        height = places.index((result.suite, result.category)) + offset + (0.25 / len(names) if hollow else 0)
        name, reach = label(result.method), _reach([result])
        _points(axes, [speedup_of(result)], [height], looks[result.method], hollow=hollow, xerr=reach, label=name)
    for border in range(1, len(places)):
        axes.axhline(border - 0.5, color=GRID, linewidth=0.8)
    labels = [label(suite) if category is None else f"· {label(category)}" for suite, category in places]
    axes.set_yticks(range(len(places)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set(xlim=(0, None), ylim=(len(places) - 0.5, -0.5), xlabel="times as fast as ar")
    legend(figure, [axes])


def _points(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style, *, hollow: bool, **more: Any) -> None:
    """Draw points with error bars: hollow without repetitive answers, else filled and named in the legend."""
    filled = {"markerfacecolor": PAPER, "label": None} if hollow else {"markerfacecolor": style.colour}
    axes.errorbar(x, y, fmt=style.marker, color=style.colour, elinewidth=1, capsize=2, **more | filled)


def speedup_of(result: Result) -> float:
    """Return a speedup to compare by; none is none."""
    return result.speedup or 0.0


def _reach(results: Sequence[Result]) -> list[list[float]]:
    """Return how far intervals reach below and above; nowhere where there are none."""
    pairs = [(speedup_of(each), each.speedup_interval or [speedup_of(each)] * 2) for each in results]
    below = [max(0.0, speedup - low) for speedup, (low, _) in pairs]
    return [below, [max(0.0, high - speedup) for speedup, (_, high) in pairs]]


def _sweep(results: Sequence[Result]) -> Plot | None:
    """Speedup against k, a line for each suite."""
    shown = [(k, each) for each in results if (k := sweep_k(each.method)) is not None and each.speedup is not None]
    lines: dict[tuple[str, str], dict[int, Result]] = {}
    for k, result in shown:
        if result.category is None:
            lines.setdefault((result.suite, result.outputs), {})[k] = result
    if not lines:
        return None
    rows = [
        (_place_name(suite, None), outputs, str(k), f"{result.speedup:.2f}", _interval(result))
        for (suite, outputs), line in lines.items()
        for k, result in sorted(line.items())
    ]
    best = [
        f"k = {fastest_k(line.values())} for {suite}" for (suite, outputs), line in lines.items() if outputs == "all"
    ]
    return Plot(
        "sweep",
        "Speedup by k",
        f"Fastest, by a star: {', '.join(best)}. Bars: 95 % interval. Hollow and dashed: without repetitive answers.",
        ("suite", "answers", "k", "speedup", "95 % interval"),
        rows,
        3.4,
        partial(_draw_sweep, lines),
    )


def _draw_sweep(lines: dict[tuple[str, str], dict[int, Result]], figure: FigureBase) -> None:
    axes = figure.subplots()
    axes.axhline(1.0, color=INK, linewidth=1.2, linestyle="--")
    looks = styles(suite for suite, _ in lines)
    for (suite, outputs), line in lines.items():
        style, hollow, best = looks[suite], outputs != "all", fastest_k(line.values())
        ks = sorted(line)
        row = [line[k] for k in ks]
        line_style, speedups = "--" if hollow else "-", [speedup_of(result) for result in row]
        reach, name = _reach(row), label(suite)
        _points(axes, ks, speedups, style, hollow=hollow, yerr=reach, label=name, linestyle=line_style)
        if best is not None:
            top = speedup_of(line[best])
            axes.plot([best], [top], marker="*", markersize=13, color=style.colour, markeredgecolor=INK)
            axes.annotate(
                f"k = {best}, {top:.2f}",
                (best, top),
                textcoords="offset points",
                xytext=(0, 12),
                ha="center",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
            )
    axes.margins(y=0.18)
    axes.set_xticks(sorted({k for line in lines.values() for k in line}))
    axes.set(xlabel="k, tokens guessed in a step", ylabel="times as fast as ar")
    legend(figure, [axes])


def _step_tokens(results: Sequence[Result], looks: dict[str, Style]) -> Plot | None:
    """Tokens per step."""
    counts = {
        (result.suite, result.method): result.step_tokens
        for result in whole_suites(results)
        if result.method in looks and len(result.step_tokens) > 1
    }
    if not counts:
        return None
    longest = max(map(len, counts.values()))
    fractions = {place: [count / sum(own) for count in own] for place, own in counts.items()}
    single = [name for name in dict.fromkeys(each.method for each in results) if name not in {m for _, m in counts}]
    always = f" Always one: {', '.join(single)}." if single else ""
    return Plot(
        "step-tokens",
        "Tokens per step",
        f"Share of the model calls that yielded this many tokens.{always}",
        ("suite, method", *map(str, range(1, longest + 1))),
        _percent_rows(fractions, longest),
        _panel_height(fractions),
        partial(_draw_fractions, fractions, looks, "tokens that came out of a step", "share of steps"),
    )


def _acceptance(results: Sequence[Result], looks: dict[str, Style]) -> Plot | None:
    """Acceptance by position."""
    fractions = {
        (result.suite, result.method): result.acceptance_by_position
        for result in whole_suites(results)
        if result.method in looks and any(result.acceptance_by_position)
    }
    if not fractions:
        return None
    # copies of the context reach far; cut the plot after the first position without acceptance
    longest = 2 + max(place for own in fractions.values() for place, fraction in enumerate(own) if fraction)
    fractions = {place: own[:longest] for place, own in fractions.items()}
    longest = max(map(len, fractions.values()))
    return Plot(
        "acceptance",
        "Acceptance by position",
        "Of the steps that guessed so far ahead, the share in which all guesses up to there were right.",
        ("suite, method", *map(str, range(1, longest + 1))),
        _percent_rows(fractions, longest),
        _panel_height(fractions),
        partial(_draw_fractions, fractions, looks, "tokens guessed ahead", "share accepted"),
    )


def whole_suites(results: Sequence[Result]) -> list[Result]:
    """Return the rows of whole suites, repetitive answers included."""
    return [result for result in results if result.is_whole_suite]


def _percent_rows(fractions: dict[tuple[str, str], list[float]], longest: int) -> list[tuple[str, ...]]:
    return [
        (f"{suite}, {method}", *(f"{fraction:.1%}" for fraction in own), *[""] * (longest - len(own)))
        for (suite, method), own in fractions.items()
    ]


def _panel_height(fractions: dict[tuple[str, str], list[float]]) -> float:
    methods, suites = {method for _, method in fractions}, {suite for suite, _ in fractions}
    return 0.8 + 1.7 * len(suites) + 0.2 * ((len(methods) + LEGEND_COLUMNS - 1) // LEGEND_COLUMNS)


def _draw_fractions(
    fractions: dict[tuple[str, str], list[float]],
    looks: dict[str, Style],
    across: str,
    up: str,
    figure: FigureBase,
) -> None:
    """Draw a panel for each suite, a line for each method; points lie on whole numbers."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    suites = list(dict.fromkeys(suite for suite, _ in fractions))
    panels = figure.subplots(len(suites), 1, squeeze=False, sharex=True)[:, 0]
    for suite, axes in zip(suites, panels, strict=True):
        for (own, method), values in fractions.items():
            if own == suite:
                style = looks[method]
                axes.plot(
                    range(1, len(values) + 1), values, marker=style.marker, color=style.colour, label=label(method)
                )
        axes.set(ylim=(0, 1.05), ylabel=up)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        if len(suites) > 1:
            axes.set_title(label(suite))
    panels[-1].set_xlabel(across)
    legend(figure, panels)


def _call_costs(report: BenchRecord) -> Plot | None:
    """Cost of a model call by its slots."""
    if report.profile is not None:
        lines = {f"prefix {length}": dict(costs) for length, costs in report.profile.seconds.items()}
        roofline: float | None = report.profile.roofline_seconds
    else:
        measured = report.environment.get("step_costs") or {}
        # JSON knows only strings as keys
        seconds = {int(slots): float(cost) for slots, cost in (measured.get("seconds") or {}).items()}
        if not seconds or seconds == ASSUMED_COSTS.seconds:
            return None
        lines, roofline = {"a call": seconds}, None
    least = f" Dashed: reading the weights from memory alone, {roofline * 1e3:.2f} ms." if roofline else ""
    in_front = " Prefix 256: with 256 tokens in the cache." if report.profile is not None else ""
    slots = sorted(next(iter(lines.values())))
    return Plot(
        "costs",
        "What a model call costs by its slots",
        f"One slot is a step of ar; the flatter, the more guesses pay.{least}{in_front}",
        ("slots", *(f"{name}, ms" for name in lines), "over 1 slot"),
        [_cost_row(lines, each) for each in slots],
        3.0,
        partial(_draw_costs, lines, roofline),
    )


def _cost_row(lines: dict[str, dict[int, float]], slots: int) -> tuple[str, ...]:
    first = next(iter(lines.values()))
    return (
        str(slots),
        *(f"{line[slots] * 1e3:.2f}" for line in lines.values()),
        f"{first[slots] / first[min(first)]:.2f}",
    )


def _draw_costs(lines: dict[str, dict[int, float]], roofline: float | None, figure: FigureBase) -> None:
    axes = figure.subplots()
    for (name, line), style in zip(lines.items(), styles(lines).values(), strict=True):
        slots = sorted(line)
        milliseconds = [line[each] * 1e3 for each in slots]
        axes.plot(slots, milliseconds, marker=style.marker, color=style.colour, label=name)
    if roofline:
        axes.axhline(roofline * 1e3, color=INK, linewidth=1.2, linestyle="--")
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="slots", ylabel="milliseconds")
    if len(lines) > 1:
        legend(figure, [axes])


def _place_name(suite: str, category: str | None) -> str:
    return suite if category is None else f"{suite}, {category}"


def _interval(result: Result) -> str:
    return "{:.2f} to {:.2f}".format(*result.speedup_interval) if result.speedup_interval else "-"

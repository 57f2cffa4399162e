"""`space bench`: methods side by side on the same prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from space_cli.cli import options
from space_cli.errors import UsageProblem

if TYPE_CHECKING:
    from pathlib import Path

    from space_cli.bench.measure import Settings
    from space_cli.bench.report import Report
    from space_cli.cli.live import RunView
    from space_cli.models.loading import LoadedModel

EPILOG = (
    "Example: space bench --limit 10    Example: space bench --suite prompts.jsonl --methods ar,space --json run.json"
)

_Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        help="Comma-separated: ar, space, space-chain, space-lookup, hf, hf-lookup, hf-assisted, llama-cpp (--list says"
        " what they are). Default: ar,space,hf (sampled: ar,space).",
    ),
]
_Profile = Annotated[
    bool,
    typer.Option(
        "--profile", help="Also tell where a step's time goes, and what a call costs by block and context length."
    ),
]
_DraftModel = Annotated[
    str | None,
    typer.Option("--draft-model", help="The smaller model that hf-assisted drafts with: alias, folder, or Hub id."),
]
_List = Annotated[bool, typer.Option("--list", help="List suites and methods, and leave.")]


def bench(
    model: options.Model = "nano",
    suite: options.Suite = None,
    limit: options.Limit = None,
    methods: _Methods = None,
    draft_model: _DraftModel = None,
    candidates: options.Candidates = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = "none",
    engine: options.Engine = "auto",
    models_file: options.ModelsFile = None,
    revision: options.Revision = None,
    json: options.Json = None,
    report_file: options.Report = None,
    plot_file: options.Plot = None,
    quiet: options.Quiet = False,
    with_profile: _Profile = False,
    show_list: _List = False,
) -> int:
    """Measure methods side by side: tokens per second, tokens per step, and whether the answers are identical."""
    from space_cli.bench.suites import load_suite

    if show_list:
        return _list()
    suites = [load_suite(name, limit=limit) for name in dict.fromkeys(suite or ["humaneval"])]

    from space_cli.cli.console import quiet_libraries

    quiet_libraries()

    from space_cli.bench.measure import Settings, check_candidates, measure
    from space_cli.bench.methods import choose_methods
    from space_cli.bench.profile import profile
    from space_cli.bench.report import results
    from space_cli.cli.live import run_view
    from space_cli.core.choose import Sampling
    from space_cli.models.engines import prepare
    from space_cli.models.loading import load_model

    names = _named(methods or ("ar,space" if temperature else "ar,space,hf"), draft_model)
    view = run_view(quiet=quiet)
    view.loading(model)
    loaded = load_model(
        model, models_file=models_file, dtype=dtype, device=device, quantization=quantization, revision=revision
    )
    draft = None
    if draft_model is not None:
        view.loading(draft_model)
        draft = load_model(draft_model, models_file=models_file, dtype=loaded.dtype, device=loaded.device)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    chosen = choose_methods(names, loaded, sampling=sampling, draft=draft)
    check_candidates(loaded, candidates, chosen)
    prompts = sum(len(each.prompts) for each in suites)
    to_come = prompts * max_new_tokens * sum(not name.startswith(("hf", "llama")) for name in names)
    loaded = prepare(loaded, engine=engine, tokens=to_come, fresh_costs=True, on_compile=view.compiling)
    settings = Settings(max_new_tokens, sampling, candidates)
    report = _report(loaded, draft, settings)
    view.begin(loaded, names, prompts)
    try:
        with view:
            for sample in measure(loaded, suites, chosen, settings, view, draft=draft):
                report.samples.append(sample)
        if with_profile:
            view.note("timing model calls")
            report.profile = profile(loaded)
        report.complete = True
    except KeyboardInterrupt:
        return 130
    finally:
        # what is done is shown and kept, whatever ended the run
        if report.samples:
            report.results = results(report.samples, names)
            _hand_out(report, json, report_file, plot_file, view)
    return 0


def _named(methods: str, draft_model: str | None) -> list[str]:
    from space_cli.bench.methods import methods_named

    names = [method.name for method in methods_named([name.strip() for name in methods.split(",")])]
    if draft_model is not None and "hf-assisted" not in names:
        raise UsageProblem("--draft-model: none of the methods drafts with it", hint="add hf-assisted to --methods")
    return names


def _list() -> int:
    from space_cli.bench.suites import SUITES

    typer.echo("Suites")
    for name, description in SUITES.items():
        typer.echo(f"  {name:<12} {description}")
    typer.echo('  FILE         JSON Lines, each line an object with "prompt" and, if you like, "task_id"')

    from space_cli.bench.methods import METHODS

    typer.echo("Methods")
    for method in METHODS.values():
        typer.echo(f"  {method.name:<12} {method.description}")
    return 0


def _report(loaded: LoadedModel, draft: LoadedModel | None, settings: Settings) -> Report:
    """Return the record of a run that has not begun."""
    from dataclasses import asdict

    import torch

    from space_cli.bench.report import Report, environment

    return Report(
        environment=environment(loaded, threads=torch.get_num_threads()),
        settings={
            "model": loaded.name,
            "source": loaded.source,
            "draft_model": draft.name if draft is not None else None,
            **asdict(settings),
        },
    )


def _hand_out(
    report: Report, json: str | None, report_file: Path | None, plot_file: Path | None, view: RunView
) -> None:
    """Write the files and show the table; with --json - standard output holds the JSON alone."""
    from contextlib import ExitStack

    from space_cli.cli.tables import show_bench, write_record

    # last in, first out: a file that cannot be written costs neither the other files nor the table of a long run
    with ExitStack() as stack:
        stack.callback(show_bench, report, view.done, to_stderr=json == "-")
        if plot_file is not None:
            stack.callback(_draw, plot_file, report)
        if report_file is not None:
            stack.callback(_write_report, report_file, report)
        stack.callback(write_record, report, json)


def _draw(file: Path, report: Report) -> None:
    from space_cli.cli.drawing import write_plots
    from space_cli.cli.plots import plots

    write_plots(file, plots(report))


def _write_report(file: Path, report: Report) -> None:
    from space_cli.cli.bench_page import bench_page
    from space_cli.cli.headline import headline
    from space_cli.cli.page import write_page

    write_page(file, headline(report), bench_page(report))

"""`space bench`: methods side by side on the same prompts."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_cli.cli import options
from space_cli.cli.texts import with_corpora, with_past_answers
from space_cli.errors import UsageProblem

if TYPE_CHECKING:
    from space_cli.bench.journal import Journal
    from space_cli.bench.methods import Method
    from space_cli.bench.record import BenchRecord
    from space_cli.cli.live import RunView
    from space_cli.models.engines import EngineName
    from space_cli.models.loading import LoadedModel
    from space_cli.tasks.plan import Plan, Settings
    from space_cli.tasks.suites import Metric, Suite

EPILOG = (
    "Example: space bench --limit 10    Example: space bench --suite prompts.jsonl --methods ar,space --json run.json"
    "    Example: space bench compare before.json after.json"
)

bench = typer.Typer(name="bench", epilog=EPILOG)

_Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        help="Comma-separated; --list says what there is; `all` takes every one that can run. Default: ar,space,hf"
        " (sampled: ar,space).",
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
_Sweep = Annotated[
    str | None,
    typer.Option(
        "--sweep",
        metavar="candidates=1..8",
        help="Find out which k is fastest here: ar and the paper's block with each of them, in one run.",
    ),
]
_Seeds = Annotated[
    int, typer.Option("--seeds", min=1, help="Answers to each prompt, under seeds from --seed on; sampled only.")
]
_Execute = Annotated[
    bool,
    typer.Option(
        "--execute",
        help="Run the model's code against the tests of suites that have some, contained (docs/bench.md).",
    ),
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Take up the run that was cut short while it wrote the file of --json.")
]
_List = Annotated[bool, typer.Option("--list", "--suites", help="List suites and methods, and leave.")]
_Record = Annotated[Path, typer.Argument(help="What `space bench --json` wrote.", show_default=False)]


@bench.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    model: options.Model = None,
    suite: options.Suite = None,
    field: options.Field = None,
    limit: options.Limit = None,
    methods: _Methods = None,
    draft_model: _DraftModel = None,
    candidates: options.Candidates = None,
    corpus: options.Corpus = None,
    sweep: _Sweep = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    seeds: _Seeds = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = "none",
    engine: options.Engine = "auto",
    execute: _Execute = False,
    models_file: options.ModelsFile = None,
    revision: options.Revision = None,
    json: options.Json = None,
    resume: _Resume = False,
    report_file: options.Report = None,
    plot_file: options.Plot = None,
    quiet: options.Quiet = False,
    with_profile: _Profile = False,
    show_list: _List = False,
) -> int:
    """Measure methods side by side: tokens per second, tokens per step, and whether the answers are identical."""
    if context.invoked_subcommand is not None:
        return 0
    if show_list:
        return _list()
    _check_together(json, resume=resume, seeds=seeds, sampled=temperature > 0)

    from space_cli.cli.console import quiet_libraries

    quiet_libraries()
    wanted = _wanted(methods, sweep, candidates, draft_model, sampled=temperature > 0)

    from space_cli.tasks.suites import load_suite

    suites = [load_suite(name, field=field) for name in dict.fromkeys(suite or ["humaneval"])]

    from space_cli.bench.methods import choose_methods
    from space_cli.bench.quality import check
    from space_cli.cli.live import run_view
    from space_cli.core.sampling import Sampling
    from space_cli.models.loading import load_model
    from space_cli.tasks.plan import Settings, check_candidates, most_tokens, plan, suites_for

    not_scored = check([each.metric for each in suites], execute=execute)
    view = run_view(quiet=quiet)
    model = options.named_model(model, quiet=quiet)
    view.loading(model)
    load = partial(load_model, models_file=models_file, device=device)
    loaded = load(model, dtype=dtype, quantization=quantization, revision=revision)
    draft = None if draft_model is None else load(draft_model, dtype=loaded.dtype)
    settings = Settings(
        max_new_tokens, Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed), candidates
    )
    chosen, left_out = choose_methods(wanted, loaded, sampling=settings.sampling, draft=draft)
    if any(method.takes_candidates for method in chosen):
        check_candidates(loaded, candidates)
    suites = suites_for(loaded, suites)
    tokens = seeds * most_tokens(suites, settings, limit=limit)
    loaded = with_corpora(_with_engine(loaded, engine, chosen, tokens, view), corpus, quiet=quiet)
    planned = plan(loaded, suites, settings, limit=limit, draft=draft)
    report = _report(loaded, draft, settings)
    report.settings |= {
        "methods": [method.name for method in chosen],
        "metrics": {each.name: each.metric for each in suites},
        "seeds": seeds,
        "sweep": sweep,
        "corpus": [str(path) for path in corpus or ()],
        "left_out": left_out | planned.left_out | not_scored | _no_pictures(report_file),
    }
    view.left_out(report.settings["left_out"])
    journal = _journal(json, report, planned, resume=resume)
    report.settings["command"] = ["space", *sys.argv[1:]]
    view.begin(loaded, report.settings["methods"], planned.turns * seeds)
    try:
        _fill(report, planned, chosen, view, journal)
        _add(report, loaded, suites, view, not_scored=not_scored, with_profile=with_profile)
        report.complete = True
    except KeyboardInterrupt:
        return 130
    finally:
        # what is done is shown and kept, whatever ended the run
        if report.samples:
            _hand_out(report, json, report_file, plot_file, view)
    if journal is not None:
        journal.finish()
    return 0


@bench.command("compare", epilog="Example: space bench compare before.json after.json")
def compare(before: _Record, after: _Record) -> int:
    """Tell what changed between two runs of `space bench --json` on the same prompts, beyond noise."""
    from space_cli.bench.compare import changes, differing, read_report
    from space_cli.cli.tables import show_changes

    reports = read_report(before), read_report(after)
    found = changes(*reports)
    if not found:
        raise UsageProblem(f"{before} and {after} have no prompt and method in common")
    show_changes(found, differing(*reports))
    return 0


def _wanted(
    methods: str | None, sweep: str | None, candidates: int | None, draft_model: str | None, *, sampled: bool
) -> list[Method]:
    """Return the methods asked for, whether the model can run them or not."""
    from space_cli.bench.methods import chains, methods_named

    if sweep is not None:
        if methods is not None or candidates is not None:
            raise UsageProblem(
                "--sweep chooses methods and candidates itself", hint="leave --methods, --candidates out"
            )
        return chains(_sizes(sweep))
    wanted = methods_named(
        [name.strip() for name in (methods or ("ar,space" if sampled else "ar,space,hf")).split(",")]
    )
    if draft_model is not None and all(method.name != "hf-assisted" for method in wanted):
        raise UsageProblem("--draft-model: none of the methods drafts with it", hint="add hf-assisted to --methods")
    return wanted


def _sizes(sweep: str) -> list[int]:
    """Read `candidates=1..8` or `candidates=1,2,5`."""
    name, _, values = sweep.partition("=")
    if name == "candidates":
        if match := re.fullmatch(r"(\d{1,3})\.\.(\d{1,3})", values):
            sizes = list(range(int(match[1]), int(match[2]) + 1))
        else:
            sizes = [int(value) for value in values.split(",") if re.fullmatch(r"\d{1,3}", value)]
        if sizes and min(sizes) >= 1 and len(sizes) >= values.count(",") + 1:
            return list(dict.fromkeys(sizes))
    raise UsageProblem(f"--sweep {sweep}: not understood", hint="give candidates=1..8 or candidates=1,2,5")


def _check_together(json: str | None, *, resume: bool, seeds: int, sampled: bool) -> None:
    """Refuse options that exclude each other, and to throw away what another run left."""
    from space_cli.bench.journal import journal_of

    if seeds > 1 and not sampled:
        raise UsageProblem("--seeds: greedy answers depend on no seed", hint="give --temperature too")
    if json in (None, "-"):
        if resume:
            raise UsageProblem("--resume takes up a run that wrote a file", hint="give the same --json FILE")
        return
    left_over = journal_of(Path(json))
    if not resume and left_over.exists():
        raise UsageProblem(
            f"{left_over} is what an interrupted run has done", hint="add --resume to go on, or delete it to begin anew"
        )


def _with_engine(
    loaded: LoadedModel, engine: EngineName, methods: list[Method], tokens: int, view: RunView
) -> LoadedModel:
    """Return the model with its engine, where methods need it with what its steps cost; `tokens` are of one method."""
    from space_cli.models.engines import measured, prepare

    ours = sum(not method.name.startswith(("hf", "llama")) for method in methods)
    loaded = prepare(loaded, engine=engine, tokens=ours * tokens, on_compile=view.compiling)
    # measured anew: an hour in which the machine was busy must not decide
    loaded = measured(loaded, fresh=True) if any(method.adaptive for method in methods) else loaded
    # of this run alone: what was answered yesterday must not count
    return with_past_answers(loaded, kept=False)


def _journal(json: str | None, report: BenchRecord, planned: Plan, *, resume: bool) -> Journal | None:
    """Return where finished prompts go at once; with `resume`, take what is there into the report."""
    from space_cli.bench.journal import Journal
    from space_cli.tasks.plan import prompts_digest

    # a device or a pipe has no folder of ours beside it
    if json in (None, "-") or (Path(json).exists() and not Path(json).is_file()):
        return None
    # neither when it was, nor what costs were measured then; answers can be scored whether they were to be or not
    told = report.environment | report.settings
    run = {name: value for name, value in told.items() if name not in ("date", "step_costs", "left_out")}
    journal = Journal(Path(json), run | {"prompts": prompts_digest(planned)})
    if resume:
        journal.resume()
        report.samples += journal.samples
    return journal


def _fill(
    report: BenchRecord,
    planned: Plan,
    methods: list[Method],
    view: RunView,
    journal: Journal | None,
) -> None:
    """Add to the report as far as the run gets."""
    from space_cli.bench.measure import measure

    done = {(sample.suite, sample.task_id, sample.seed) for sample in report.samples}
    with view, journal or nullcontext():
        for samples in measure(planned.prompts, methods, view, seeds=report.settings["seeds"], done=done):
            report.samples += samples
            if journal is not None:
                journal.add(samples)


def _add(
    report: BenchRecord,
    loaded: LoadedModel,
    suites: list[Suite],
    view: RunView,
    *,
    not_scored: Collection[Metric],
    with_profile: bool,
) -> None:
    """Add what has no place between answers that are timed."""
    if with_profile:
        from space_cli.bench.profile import profile

        view.note("timing model calls")
        report.profile = profile(loaded)
    if any(suite.metric is not None and suite.metric not in not_scored for suite in suites):
        from space_cli.bench.quality import score_all

        view.note("judging answers")
        score_all(report.samples, suites, missing=not_scored)


def _no_pictures(report_file: Path | None) -> dict[str, str]:
    """Return why a page will have no pictures, as what is left out of a run."""
    if report_file is None or report_file.suffix != ".html" or find_spec("matplotlib") is not None:
        return {}
    return {"pictures of --report": "need matplotlib: pip install 'space-decoding[plot]'"}


def _list() -> int:
    from space_cli.rows import SUFFIXES
    from space_cli.tasks.suites import SUITES

    typer.echo("Suites")
    for name, dataset_format in SUITES.items():
        typer.echo(f"  {name:<18} {dataset_format.description}\n  {'':<18} from {dataset_format.needs}")
    typer.echo(f"  {'NAME=FILE':<18} the same prompts from a file, or from another dataset of the Hub")
    typer.echo(f"  {'FILE':<18} one of these told by its fields, or rows with a prompt (or --field NAME)")
    typer.echo(f"  {'':<18} and, if you like, task_id and category; {', '.join(SUFFIXES)}")

    from space_cli.bench.methods import METHODS

    typer.echo("Methods")
    for method in METHODS.values():
        typer.echo(f"  {method.name:<12} {method.description}")
    return 0


def _report(loaded: LoadedModel, draft: LoadedModel | None, settings: Settings) -> BenchRecord:
    """Return the record of a run that has not begun."""
    from dataclasses import asdict

    import torch

    from space_cli.bench.record import BenchRecord
    from space_cli.tasks.environment import environment

    return BenchRecord(
        environment=environment(loaded, threads=torch.get_num_threads()),
        settings={
            "model": loaded.name,
            "source": loaded.source,
            "masks_per_group": loaded.masks_per_group,
            "draft_model": draft.name if draft is not None else None,
            **asdict(settings),
        },
    )


def _hand_out(
    report: BenchRecord, json: str | None, report_file: Path | None, plot_file: Path | None, view: RunView
) -> None:
    """Write the files and show the table; with --json - standard output holds the JSON alone."""
    from space_cli.bench.results import results
    from space_cli.cli.tables import show_bench, write_record

    report.results = results(report.samples, report.settings["methods"], report.settings["metrics"])

    # last in, first out: a file that cannot be written costs neither the other files nor the table of a long run
    with ExitStack() as stack:
        stack.callback(show_bench, report, view.done, to_stderr=json == "-")
        if plot_file is not None:
            stack.callback(_draw, plot_file, report)
        if report_file is not None:
            stack.callback(_write_report, report_file, report)
        stack.callback(write_record, report, json)


def _draw(file: Path, report: BenchRecord) -> None:
    from space_cli.cli.drawing import write_plots
    from space_cli.cli.plots import plots

    write_plots(file, plots(report))


def _write_report(file: Path, report: BenchRecord) -> None:
    from space_cli.cli.bench_page import bench_page
    from space_cli.cli.headline import headline
    from space_cli.cli.page import write_page

    write_page(file, headline(report), bench_page(report))

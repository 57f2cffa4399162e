"""`space bench`: methods side by side on the same prompts."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from space_cli.cli import options
from space_cli.cli.groups import Group, grouped
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
    from space_cli.tasks.prompts import Metric, Suite

EPILOG = (
    "Example: space bench --limit 10    Example: space bench --suite prompts.jsonl --methods ar,space --json run.json"
    "    Example: space bench compare before.json after.json"
)

bench = typer.Typer(name="bench", epilog=EPILOG)


def _list_and_leave(show: bool) -> None:
    if show:
        _list()
        raise typer.Exit


_List = Annotated[
    bool,
    typer.Option("--list", "--suites", callback=_list_and_leave, is_eager=True, help="List suites and methods."),
]
_Record = Annotated[Path, typer.Argument(help="What `space bench --json` wrote.", show_default=False)]


class MethodOptions(Group):
    """What is measured beside ar, and how often."""

    methods: str | None = Field(
        None,
        description="Comma-separated; --list says what there is; `all` takes every one that can run. Default:"
        " ar,space,hf (sampled: ar,space).",
    )
    draft_model: str | None = Field(
        None, description="The smaller model that hf-assisted drafts with: alias, folder, or Hub id."
    )
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            metavar="candidates=1..8",
            help="Find out which k is fastest here: ar and the paper's block with each of them, in one run.",
        ),
    ] = None
    seeds: int = Field(1, ge=1, description="Answers to each prompt, under seeds from --seed on; sampled only.")

    def named(self, candidates: int | None, *, sampled: bool) -> list[Method]:
        """Return the methods asked for, whether the model can run them or not.

        Raises:
            UsageProblem: unknown methods, or options that exclude each other.
        """
        from space_cli.bench.methods import chains, methods_named
        from space_cli.bench.sweep import parse_sweep

        options.check_seeds(self.seeds, sampled=sampled)
        if self.sweep is not None:
            if self.methods is not None or candidates is not None:
                raise UsageProblem(
                    "--sweep chooses methods and candidates itself", hint="leave --methods, --candidates out"
                )
            return chains(parse_sweep(self.sweep))
        names = self.methods or ("ar,space" if sampled else "ar,space,hf")
        methods = methods_named([name.strip() for name in names.split(",")])
        if self.draft_model is not None and all(method.name != "hf-assisted" for method in methods):
            raise UsageProblem("--draft-model: none of the methods drafts with it", hint="add hf-assisted to --methods")
        return methods

    def loaded_draft(self, load: options.LoadOptions, loaded: LoadedModel) -> LoadedModel | None:
        """Return the draft model in the dtype of the model it drafts for, or None where there is none."""
        if self.draft_model is None:
            return None
        return load.load(self.draft_model, dtype=loaded.dtype, quantization="none")


class ResultOptions(Group):
    """How answers are scored, and where results go."""

    execute: bool = Field(
        False, description="Run the model's code against the tests of suites that have some, contained (docs/bench.md)."
    )
    with_profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Also measure where a step's time goes, and a call's cost by block and context length.",
        ),
    ] = False
    json_file: options.Json = None
    resume: bool = Field(False, description="Take up the run that was cut short while it wrote the file of --json.")
    report_file: options.Report = None
    plot_file: options.Plot = None

    def check(self) -> None:
        """Refuse to resume without a file, and to throw away what another run left.

        Raises:
            UsageProblem: one of the two.
        """
        from space_cli.bench.journal import journal_of

        if self.json_file is None or self.json_file == "-":
            if self.resume:
                raise UsageProblem("--resume takes up a run that wrote a file", hint="give the same --json FILE")
            return
        left_over = journal_of(Path(self.json_file))
        if not self.resume and left_over.exists():
            raise UsageProblem(
                f"{left_over} is what an interrupted run has done",
                hint="add --resume to go on, or delete it to start over",
            )


@bench.callback(invoke_without_command=True)
@grouped
def run(
    context: typer.Context,
    *,
    model: options.Model = None,
    prompts: options.PromptOptions,
    methods: MethodOptions,
    candidates: options.Candidates = None,
    corpus: options.Corpus = None,
    max_new_tokens: options.MaxNewTokens = 256,
    sampling: options.SamplingOptions,
    load: options.LoadOptions,
    revision: options.Revision = None,
    engine: options.Engine = "auto",
    output: ResultOptions,
    quiet: options.Quiet = False,
    show_list: _List = False,
) -> int:
    """Measure methods side by side: tokens per second, tokens per step, and whether the answers are identical."""
    del show_list
    if context.invoked_subcommand is not None:
        return 0
    output.check()

    from space_cli.cli.console import quiet_libraries

    quiet_libraries()
    requested = methods.named(candidates, sampled=sampling.temperature > 0)
    suites = prompts.suites()

    from space_cli.bench.methods import choose_methods
    from space_cli.bench.quality import check
    from space_cli.cli.live import run_view
    from space_cli.tasks.plan import Settings, check_candidates, most_tokens, plan, suites_for

    not_scored = check([each.metric for each in suites], execute=output.execute)
    view = run_view(quiet=quiet)
    model = options.named_model(model, quiet=quiet)
    view.loading(model)
    loaded = load.load(model, revision=revision)
    draft = methods.loaded_draft(load, loaded)
    settings = Settings(max_new_tokens, sampling.sampling(), candidates)
    chosen, left_out = choose_methods(requested, loaded, sampling=settings.sampling, draft=draft)
    if any(method.takes_candidates for method in chosen):
        check_candidates(loaded, candidates)
    suites = suites_for(loaded, suites)
    tokens = methods.seeds * most_tokens(suites, settings, limit=prompts.limit)
    loaded = with_corpora(_with_engine(loaded, engine, chosen, tokens, view), corpus, quiet=quiet)
    planned = plan(loaded, suites, settings, limit=prompts.limit, draft=draft)
    report = _report(loaded, draft, settings)
    report.settings |= {
        "methods": [method.name for method in chosen],
        "metrics": {each.name: each.metric for each in suites},
        "seeds": methods.seeds,
        "sweep": methods.sweep,
        "corpus": [str(path) for path in corpus or ()],
        "left_out": left_out | planned.left_out | not_scored | _no_pictures(output.report_file),
    }
    return _measure(_Run(loaded, suites, chosen, planned, report, not_scored), output, view)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run that has not begun; `report` is filled as it goes on."""

    loaded: LoadedModel
    suites: list[Suite]
    methods: list[Method]
    plan: Plan
    report: BenchRecord
    not_scored: Collection[Metric]


def _measure(run: _Run, output: ResultOptions, view: RunView) -> int:
    """Measure, and write the results however the run ends; return the exit code."""
    report = run.report
    view.left_out(report.settings["left_out"])
    journal = _journal(output, report, run.plan)
    report.settings["command"] = ["space", *sys.argv[1:]]
    view.begin(run.loaded, report.settings["methods"], run.plan.turns * report.settings["seeds"])
    try:
        _fill(run, view, journal)
        _add(run, view, with_profile=output.with_profile)
        report.complete = True
    except KeyboardInterrupt:
        return 130
    finally:
        if report.samples:
            _hand_out(report, output, view)
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


def _with_engine(
    loaded: LoadedModel, engine: EngineName, methods: list[Method], tokens: int, view: RunView
) -> LoadedModel:
    """Return the model with its engine, and with step costs if methods need them; `tokens` are those of one method."""
    from space_cli.models.engines import measured, prepare

    ours = sum(not method.name.startswith(("hf", "llama")) for method in methods)
    loaded = prepare(loaded, engine=engine, tokens=ours * tokens, on_compile=view.compiling, on_eager=view.eager)
    # always measured again: costs from a busy hour must not decide
    loaded = measured(loaded, fresh=True) if any(method.adaptive for method in methods) else loaded
    # only answers of this run: those of earlier runs must not count
    return with_past_answers(loaded, kept=False)


def _journal(output: ResultOptions, report: BenchRecord, planned: Plan) -> Journal | None:
    """Return where finished prompts go at once; with `resume`, take what is there into the report."""
    from space_cli.bench.journal import Journal
    from space_cli.tasks.plan import prompts_digest

    json = output.json_file
    # a device or a pipe has no folder for a journal
    if json is None or json == "-" or (Path(json).exists() and not Path(json).is_file()):
        return None
    # not the date and the measured costs, which differ when resuming; scoring may be added later
    facts = report.environment | report.settings
    run = {name: value for name, value in facts.items() if name not in ("date", "step_costs", "left_out")}
    journal = Journal(Path(json), run | {"prompts": prompts_digest(planned)})
    if output.resume:
        journal.resume()
        report.samples += journal.samples
    return journal


def _fill(run: _Run, view: RunView, journal: Journal | None) -> None:
    """Add answers to the report as far as the run gets."""
    from space_cli.bench.measure import measure

    report = run.report
    done = {(sample.suite, sample.task_id, sample.seed) for sample in report.samples}
    with view, journal or nullcontext():
        for samples in measure(run.plan.prompts, run.methods, view, seeds=report.settings["seeds"], done=done):
            report.samples += samples
            if journal is not None:
                journal.add(samples)


def _add(run: _Run, view: RunView, *, with_profile: bool) -> None:
    """Add what has no place between answers that are timed."""
    if with_profile:
        from space_cli.bench.profile import profile

        view.note("timing model calls")
        run.report.profile = profile(run.loaded)
    if any(suite.metric is not None and suite.metric not in run.not_scored for suite in run.suites):
        from space_cli.bench.quality import score_all

        view.note("scoring answers")
        score_all(run.report.samples, run.suites, missing=run.not_scored)


def _no_pictures(report_file: Path | None) -> dict[str, str]:
    """Return why a page will have no pictures, as what is left out of a run."""
    if report_file is None or report_file.suffix != ".html" or find_spec("matplotlib") is not None:
        return {}
    return {"pictures of --report": "need matplotlib: pip install 'space-decoding[plot]'"}


def _list() -> None:
    from space_cli.rows import SUFFIXES
    from space_cli.tasks.formats import SUITES

    typer.echo("Suites")
    for name, dataset_format in SUITES.items():
        typer.echo(f"  {name:<18} {dataset_format.description}\n  {'':<18} from {dataset_format.needs}")
    typer.echo(f"  {'NAME=FILE':<18} the same prompts from a file, or from another dataset of the Hub")
    typer.echo(f"  {'FILE':<18} one of these, recognised by its fields, or rows with a prompt (or --field NAME)")
    typer.echo(f"  {'':<18} and, if you like, task_id and category; {', '.join(SUFFIXES)}")

    from space_cli.bench.methods import METHODS

    typer.echo("Methods")
    for method in METHODS.values():
        typer.echo(f"  {method.name:<12} {method.description}")


def _report(loaded: LoadedModel, draft: LoadedModel | None, settings: Settings) -> BenchRecord:
    """Return the record of a run that has not begun."""
    from space_cli.bench.record import BenchRecord
    from space_cli.tasks.environment import environment

    facts = settings.recorded(loaded) | {"draft_model": draft.name if draft is not None else None}
    return BenchRecord(environment=environment(loaded), settings=facts)


def _hand_out(report: BenchRecord, output: ResultOptions, view: RunView) -> None:
    """Write the files and show the table; with --json - standard output holds the JSON alone."""
    from space_cli.bench.results import results
    from space_cli.cli.console import write_json
    from space_cli.cli.tables import show_bench

    report.results = results(report.samples, report.settings["methods"], report.settings["metrics"])

    # last in, first out: a file that cannot be written costs neither the other files nor the table of a long run
    with ExitStack() as stack:
        stack.callback(show_bench, report, view.done, to_stderr=output.json_file == "-")
        if output.plot_file is not None:
            stack.callback(_draw, output.plot_file, report)
        if output.report_file is not None:
            stack.callback(_write_report, output.report_file, report)
        stack.callback(write_json, report.to_json, output.json_file)


def _draw(file: Path, report: BenchRecord) -> None:
    from space_cli.report.drawing import write_plots
    from space_cli.report.plots import plots

    write_plots(file, plots(report))


def _write_report(file: Path, report: BenchRecord) -> None:
    from space_cli.report.bench_page import bench_page
    from space_cli.report.headline import headline
    from space_cli.report.page import write_page

    write_page(file, headline(report), bench_page(report))

"""`space verify-lossless`: is the output the same, against whom, and where not, why."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import Field

from space_cli.cli import options
from space_cli.cli.groups import Group, grouped
from space_cli.cli.texts import with_corpora, with_past_answers
from space_cli.errors import RunFailed, UsageProblem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from space_cli.cli.live import RunView
    from space_cli.core.block import Block
    from space_cli.core.engine import Numerics
    from space_cli.models.loading import LoadedModel
    from space_cli.tasks.plan import Planned, Settings
    from space_cli.verify.compare import Comparison
    from space_cli.verify.record import Verification

EPILOG = (
    "Example: space verify-lossless --limit 20    "
    "Example: space verify-lossless --model ./mine --drafts mixed --report proof.html"
)

_UNTRAINED_CANDIDATES, _MAX_CANDIDATES = 5, 31

_Strict = Annotated[bool, typer.Option("--strict", help="Ties fail too.")]


class ComparisonOptions(Group):
    """What SPACE is compared with, and how."""

    against: str | None = Field(
        None,
        description="Comma-separated: ar (our AR baseline), hf (transformers' generate), base (an adapter's base model"
        " without the adapter). Default: all that there are.",
    )
    drafts: Literal["adaptive", "model", "mixed"] | None = Field(
        None,
        description="adaptive: those of everyday use. model: the masks' guesses in the paper's block. mixed: right and"
        " wrong tokens blended, so that every acceptance length occurs. Default: adaptive; with a block of one"
        " shape, model where the model has masks, else mixed.",
    )
    numerics: Literal["auto", "plain", "same-shape", "invariant"] = Field(
        "auto",
        description="plain: the model's own kernels. invariant: kernels that round a token alike alone and in a block."
        " same-shape: ar runs blocks of SPACE's shape too. auto: invariant in half precision on a CPU, else plain.",
    )
    candidates: options.Candidates = None
    seeds: int = Field(1, ge=1, description="Number of seeds, sampled runs only.")
    draws: int = Field(
        400, ge=100, description="Seeds whose first tokens are tested against hf's distribution, sampled."
    )

    @property
    def same_shape(self) -> bool:
        """Whether AR runs blocks of SPACE's shape."""
        return self.numerics == "same-shape"

    def check(self, engine: str, *, sampled: bool) -> None:
        """Refuse options that exclude each other.

        Raises:
            UsageProblem: two of them do.
        """
        if self.drafts == "adaptive" and (self.same_shape or self.candidates is not None):
            raise UsageProblem("--drafts adaptive: blocks differ from step to step", hint="use --drafts model")
        if self.numerics != "auto" and engine == "compiled":
            raise UsageProblem(
                f"--numerics {self.numerics}: a way to run the model as it is", hint="leave --engine out"
            )
        options.check_seeds(self.seeds, sampled=sampled)

    def names(self) -> tuple[str, ...]:
        """Return what to compare with, as asked for; nothing where that is left to the model.

        Raises:
            UsageProblem: an unknown name.
        """
        from space_cli.verify.record import AGAINST

        names = () if self.against is None else tuple(dict.fromkeys(each.strip() for each in self.against.split(",")))
        for name in names:
            if name not in AGAINST:
                raise UsageProblem(
                    f"--against {name}: nothing of that name to compare with", hint=f"use {', '.join(AGAINST)}"
                )
        return names

    def drafts_for(self, loaded: LoadedModel) -> Literal["adaptive", "model", "mixed"]:
        """Return what drafts are made of."""
        if self.drafts is not None:
            return self.drafts
        if not self.same_shape and self.candidates is None:
            return "adaptive"
        return "model" if loaded.candidates else "mixed"


@grouped
def verify_lossless(
    *,
    model: options.Model = None,
    prompts: options.PromptOptions,
    against: ComparisonOptions,
    corpus: options.Corpus = None,
    max_new_tokens: options.MaxNewTokens = 256,
    sampling: options.SamplingOptions,
    strict: _Strict = False,
    load: options.LoadOptions,
    engine: options.Engine = "auto",
    revision: options.Revision = None,
    json_file: options.Json = None,
    report_file: options.Report = None,
    quiet: options.Quiet = False,
) -> int:
    """Check that SPACE's output is token for token that of plain decoding, and examine every divergence."""
    names = against.names()
    against.check(engine, sampled=sampling.temperature > 0)
    suites = prompts.suites()

    from space_cli.cli.console import quiet_libraries

    quiet_libraries()

    from space_cli.cli.live import run_view
    from space_cli.models.engines import prepare
    from space_cli.tasks.plan import Settings, most_tokens, plan, suites_for

    view = run_view(quiet=quiet)
    model = options.named_model(model, quiet=quiet)
    view.loading(model)
    loaded = load.load(model, revision=revision)
    suites = suites_for(loaded, suites)
    comparison = _comparison(loaded, against, names, load, view)
    numerics = _shaped(loaded, against.numerics)
    settings = Settings(max_new_tokens, sampling.sampling(), against.candidates, numerics)
    loaded = prepare(
        loaded,
        engine=engine if against.numerics == "auto" else "eager",
        tokens=2 * against.seeds * most_tokens(suites, settings, limit=prompts.limit),
        on_compile=view.compiling,
        on_eager=view.eager,
    )
    loaded = with_corpora(with_past_answers(loaded, kept=False), corpus, quiet=quiet)
    planned = plan(loaded, suites, settings, limit=prompts.limit)
    view.left_out(planned.left_out)
    record = _record(loaded, comparison, settings, strict=strict)
    view.begin(loaded, comparison.methods(settings.sampling), planned.turns * against.seeds, unit="answers")
    try:
        with view, _noting_a_break(record):
            _run(record, planned.prompts, comparison, view, draws=against.draws)
        record.complete = True
    except KeyboardInterrupt:
        return 130
    finally:
        # what is done is shown and kept, whatever ended the run
        if record.answers:
            record.conclude(candidates=comparison.candidates, strict=strict)
            _hand_out(record, json_file, report_file, view)
    return 0 if record.lossless else 1


@contextmanager
def _noting_a_break(record: Verification) -> Iterator[None]:
    """From answers before an error nothing follows for the model: it gets no verdict."""
    try:
        yield
    except RunFailed:
        record.broken = True
        raise


def _comparison(
    loaded: LoadedModel,
    against: ComparisonOptions,
    names: tuple[str, ...],
    load: options.LoadOptions,
    view: RunView,
) -> Comparison:
    from space_cli.verify.compare import Comparison

    names = names or ("ar", "hf", *(["base"] if _base_of(loaded) else []))
    base = _load_base(loaded, load, view) if "base" in names else None
    drafts = against.drafts_for(loaded)
    block = _block(loaded, drafts, against.candidates)
    return Comparison(block, drafts, names, base, against.same_shape, against.seeds)


def _load_base(loaded: LoadedModel, load: options.LoadOptions, view: RunView) -> LoadedModel:
    name = _base_of(loaded)
    if name is None:
        raise UsageProblem(f"--against base: {loaded.name} is no adapter", hint="use ar, hf or both")
    view.loading(name)
    return load.load(name)


def _base_of(loaded: LoadedModel) -> str | None:
    return loaded.space.base_model if loaded.space is not None and loaded.space.method == "adapter" else None


def _block(loaded: LoadedModel, drafts: str, candidates: int | None) -> Block:
    """Return SPACE's block; for a model without masks, candidates alone."""
    from space_cli.core.block import Block
    from space_cli.tasks.plan import check_candidates

    if loaded.candidates:
        check_candidates(loaded, candidates)
        k = candidates or loaded.candidates
        return Block.chain(k, k)
    if drafts == "model":
        raise UsageProblem(f"{loaded.name} has no masks to draft with", hint="use --drafts adaptive or mixed")
    k = _UNTRAINED_CANDIDATES if candidates is None else candidates
    if not 1 <= k <= _MAX_CANDIDATES:
        raise UsageProblem(f"--candidates {k}: out of range", hint=f"choose 1 to {_MAX_CANDIDATES}")
    return Block.chain(k, 0)


def _shaped(loaded: LoadedModel, numerics: str) -> Numerics | None:
    from space_cli.core.engine import default_numerics

    if numerics == "auto":
        # on a GPU it depends on the engine, which pads its rows where it can
        return None if loaded.device.startswith("cuda") else default_numerics(loaded.model)
    # blocks of one shape also need one length of the cache
    return "plain" if numerics == "plain" else "invariant"


def _record(loaded: LoadedModel, comparison: Comparison, settings: Settings, *, strict: bool) -> Verification:
    """Return the record of a run that has not begun."""
    from space_cli.tasks.environment import environment
    from space_cli.verify.record import Verification

    own = {
        "numerics": "same-shape" if comparison.same_shape else settings.numerics,
        "drafts": comparison.drafts,
        "against": list(comparison.against),
        "seeds": comparison.seeds,
        "strict": strict,
    }
    return Verification(environment=environment(loaded), settings=settings.recorded(loaded) | own)


def _run(
    record: Verification, planned: Sequence[Planned], comparison: Comparison, view: RunView, *, draws: int
) -> None:
    """Fill the record as far as it gets."""
    from space_cli.verify.compare import compare, samplers
    from space_cli.verify.distribution import compare_distributions
    from space_cli.verify.self_test import self_test

    task = planned[0].task
    record.kernels = self_test(task, comparison.block, same_shape=comparison.same_shape)
    for answer in compare(planned, comparison, view):
        record.answers.append(answer)
    if task.sampling.temperature and "hf" in comparison.against:
        view.note(f"drawing the first tokens of {planned[0].name} under {draws} seeds")
        record.distributions += compare_distributions(planned[0], samplers(comparison), draws=draws)


def _hand_out(record: Verification, json: str | None, report: Path | None, view: RunView) -> None:
    """Write the record and the report and show the verdict; with --json - standard output holds the JSON alone."""
    from space_cli.cli.console import write_json
    from space_cli.cli.tables import show_verification
    from space_cli.report.page import write_page
    from space_cli.report.verify_page import verification_page
    from space_cli.report.wording import verdict

    try:
        write_json(record.to_json, json)
        if report is not None:
            write_page(report, verdict(record), verification_page(record))
    finally:
        # a file that cannot be written must not cost the verdict of a long run
        show_verification(record, view.done, to_stderr=json == "-")

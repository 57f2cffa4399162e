"""`space verify-lossless`: is the output the same, against whom, and where not, why."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from space_cli.cli import options
from space_cli.cli.texts import with_corpora, with_past_answers
from space_cli.errors import RunFailed, UsageProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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

_Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        help="Comma-separated: ar (our AR baseline), hf (transformers' generate), base (an adapter's base model without"
        " the adapter). Default: all that there are.",
    ),
]
_Drafts = Annotated[
    Literal["adaptive", "model", "mixed"] | None,
    typer.Option(
        "--drafts",
        help="adaptive: those of everyday use. model: the masks' guesses in the paper's block. mixed: right and wrong"
        " tokens blended, so that every acceptance length occurs. Default: adaptive; with a block of one shape, model"
        " where the model has masks, else mixed.",
    ),
]
_Numerics = Annotated[
    Literal["auto", "plain", "same-shape", "invariant"],
    typer.Option(
        "--numerics",
        help="plain: the model's own kernels. invariant: kernels that round a token alike alone and in a block."
        " same-shape: ar runs blocks of SPACE's shape too. auto: invariant in half precision on a CPU, else plain.",
    ),
]
_Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds, sampled runs only.")]
_Draws = Annotated[
    int,
    typer.Option("--draws", min=100, help="Seeds whose first tokens are tested against hf's distribution, sampled."),
]
_Strict = Annotated[bool, typer.Option("--strict", help="Ties fail too.")]


def verify_lossless(
    model: options.Model = None,
    suite: options.Suite = None,
    field: options.Field = None,
    limit: options.Limit = None,
    against: _Against = None,
    drafts: _Drafts = None,
    numerics: _Numerics = "auto",
    candidates: options.Candidates = None,
    corpus: options.Corpus = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    seeds: _Seeds = 1,
    draws: _Draws = 400,
    strict: _Strict = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = "none",
    engine: options.Engine = "auto",
    models_file: options.ModelsFile = None,
    revision: options.Revision = None,
    json: options.Json = None,
    report: options.Report = None,
    quiet: options.Quiet = False,
) -> int:
    """Check that SPACE's output is token for token that of plain decoding, and examine every divergence."""
    from space_cli.tasks.suites import load_suite

    names = _named(against)
    _check_together(numerics, engine, drafts, candidates)
    if seeds > 1 and not temperature:
        raise UsageProblem("--seeds: greedy answers depend on no seed", hint="give --temperature too")
    suites = [load_suite(name, field=field) for name in dict.fromkeys(suite or ["humaneval"])]

    from space_cli.cli.console import quiet_libraries

    quiet_libraries()

    from space_cli.cli.live import run_view
    from space_cli.core.sampling import Sampling
    from space_cli.models.engines import prepare
    from space_cli.models.loading import load_model
    from space_cli.tasks.plan import Settings, most_tokens, plan, suites_for
    from space_cli.verify.compare import Comparison

    view = run_view(quiet=quiet)
    model = options.named_model(model, quiet=quiet)
    view.loading(model)
    load = partial(load_model, models_file=models_file, dtype=dtype, device=device, quantization=quantization)
    loaded = load(model, revision=revision)
    suites = suites_for(loaded, suites)
    names = names or ("ar", "hf", *(["base"] if _base_of(loaded) else []))
    base = _load_base(loaded, load, view) if "base" in names else None
    same_shape = numerics == "same-shape"
    drafts = drafts or _default_drafts(loaded, fixed=same_shape or candidates is not None)
    block = _block(loaded, drafts, candidates)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    settings = Settings(max_new_tokens, sampling, candidates, _shaped(loaded, numerics))
    loaded = prepare(
        loaded,
        engine=engine if numerics == "auto" else "eager",
        tokens=2 * seeds * most_tokens(suites, settings, limit=limit),
        on_compile=view.compiling,
    )
    loaded = with_corpora(with_past_answers(loaded, kept=False), corpus, quiet=quiet)
    planned = plan(loaded, suites, settings, limit=limit)
    view.left_out(planned.left_out)
    comparison = Comparison(block, drafts, names, base, same_shape, seeds)
    record = _record(loaded, comparison, settings, strict=strict)
    run_names = ["ar", "space", *(["hf"] if "hf" in names and not temperature else []), *(["base"] if base else [])]
    view.begin(loaded, run_names, planned.turns * seeds, unit="answers")
    try:
        with view, _noting_a_break(record):
            _run(record, planned.prompts, comparison, view, draws=draws)
        record.complete = True
    except KeyboardInterrupt:
        return 130
    finally:
        # what is done is shown and kept, whatever ended the run
        if record.answers:
            record.conclude(candidates=None if drafts == "adaptive" else block.num_candidates, strict=strict)
            _hand_out(record, json, report, view)
    return 0 if record.lossless else 1


@contextmanager
def _noting_a_break(record: Verification) -> Iterator[None]:
    """From answers before an error nothing follows for the model: it gets no verdict."""
    try:
        yield
    except RunFailed:
        record.broken = True
        raise


def _load_base(loaded: LoadedModel, load: Callable[[str], LoadedModel], view: RunView) -> LoadedModel:
    name = _base_of(loaded)
    if name is None:
        raise UsageProblem(f"--against base: {loaded.name} is no adapter", hint="use ar, hf or both")
    view.loading(name)
    return load(name)


def _check_together(numerics: str, engine: str, drafts: str | None, candidates: int | None) -> None:
    """Refuse options that exclude each other."""
    if drafts == "adaptive" and (numerics == "same-shape" or candidates is not None):
        raise UsageProblem("--drafts adaptive: blocks differ from step to step", hint="use --drafts model")
    if numerics != "auto" and engine == "compiled":
        raise UsageProblem(f"--numerics {numerics}: a way to run the model as it is", hint="leave --engine out")


def _default_drafts(loaded: LoadedModel, *, fixed: bool) -> Literal["adaptive", "model", "mixed"]:
    if not fixed:
        return "adaptive"
    return "model" if loaded.candidates else "mixed"


def _base_of(loaded: LoadedModel) -> str | None:
    return loaded.space.base_model if loaded.space is not None and loaded.space.method == "adapter" else None


def _named(against: str | None) -> tuple[str, ...]:
    from space_cli.verify.record import AGAINST

    names = tuple(dict.fromkeys(name.strip() for name in against.split(","))) if against is not None else ()
    for name in names:
        if name not in AGAINST:
            raise UsageProblem(
                f"--against {name}: nothing of that name to compare with", hint=f"use {', '.join(AGAINST)}"
            )
    return names


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
    from dataclasses import asdict

    import torch

    from space_cli.tasks.environment import environment
    from space_cli.verify.record import Verification

    return Verification(
        environment=environment(loaded, threads=torch.get_num_threads()),
        settings={
            "model": loaded.name,
            "source": loaded.source,
            "masks_per_group": loaded.masks_per_group,
            **asdict(settings),
            "numerics": "same-shape" if comparison.same_shape else settings.numerics,
            "drafts": comparison.drafts,
            "against": list(comparison.against),
            "seeds": comparison.seeds,
            "strict": strict,
        },
    )


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
    from space_cli.cli.page import write_page
    from space_cli.cli.tables import show_verification, verdict, write_record
    from space_cli.cli.verify_page import verification_page

    try:
        write_record(record, json)
        if report is not None:
            write_page(report, verdict(record), verification_page(record))
    finally:
        # a file that cannot be written must not cost the verdict of a long run
        show_verification(record, view.done, to_stderr=json == "-")

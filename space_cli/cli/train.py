"""`space train`: fine-tune a model for SPACE, all weights or an adapter."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from space_cli.cli import options
from space_cli.errors import Interrupted, UsageProblem

if TYPE_CHECKING:
    from space_cli.cli.train_view import TrainView
    from space_cli.models.checkpoint import SpaceConfig
    from space_cli.models.loading import LoadedModel
    from space_cli.training.data import Conversation
    from space_cli.training.own_data import OwnData
    from space_cli.training.prepare import Method, Prepared
    from space_cli.training.run import Recipe

EPILOG = (
    "Example: space train --data answers.jsonl --output mine    "
    "Example: space train --model org/model --quantization nf4 --method adapter --data org/dataset --output mine"
)
_ENDLESS = 10_000_000  # steps: the hours end it
_OWN_QUESTIONS, _DRY_QUESTIONS = 2000, 8
_ADAPTER_ABOVE = 1_000_000_000
_GROUPS = {"full": 8, "adapter": 48}
_LEARNING_RATES = {"full": 5e-5, "adapter": 1e-3}

_Limit = Annotated[int | None, typer.Option("--limit", "-L", min=1, help="Only the first N examples of each source.")]
_Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        help="A .jsonl, .json, .parquet, .csv or .txt file (.gz too), a Hub dataset id, or self: the model asks itself;"
        " repeatable.",
        metavar="DATA",
    ),
]
_Output = Annotated[Path, typer.Option("--output", "-o", callback=options.at_home, help="Folder of the checkpoint.")]
_Method = Annotated[
    Literal["auto", "full", "adapter"],
    typer.Option(
        "--method",
        help="full: all weights. adapter: the base stays as it is. auto: adapter from 1B on or over quantised weights.",
    ),
]
_Candidates = Annotated[int, typer.Option("--candidates", min=1, max=31, help="k, and masks of a group.")]
_Masks = Annotated[
    Literal["distinct", "single"], typer.Option("--masks", help="One mask id per position, or one for all (paper).")
]
_Form = Annotated[
    Literal["groups", "paper"],
    typer.Option("--form", help="groups: several mask groups ride along in each example. paper: one, with --p-sar."),
]
_Groups = Annotated[
    int | None, typer.Option("--groups", min=1, help="Mask groups of an example. Default: 8 (full), 48 (adapter).")
]
_PSar = Annotated[
    float,
    typer.Option(
        "--p-sar", callback=options.finite, min=0.0, max=1.0, help="Share of examples with masks (paper form)."
    ),
]
_MaskLossWeight = Annotated[
    float,
    typer.Option("--mask-loss-weight", callback=options.finite, min=0.0, help="Of a mask's loss, beside a token's."),
]
_Loss = Annotated[
    Literal["kl", "ce"],
    typer.Option("--loss", help="Of an adapter. kl: the base's distribution at each position. ce: the token there."),
]
_Rank = Annotated[
    int | None, typer.Option("--rank", min=1, help="Of an adapter's low-rank weights; 32, or that of the one it has.")
]
_Distill = Annotated[
    str,
    typer.Option(
        "--distill", help="Prompts that the base answers itself, to learn from; off for none.", metavar="N|off"
    ),
]
_Temperatures = Annotated[str, typer.Option("--temperatures", help="Of those answers, in turn; 0 is greedy.")]
_AnswerTokens = Annotated[int, typer.Option("--answer-tokens", min=2, help="Most tokens of such an answer.")]
_AnswerBatch = Annotated[int, typer.Option("--answer-batch-size", min=1, help="Prompts the base answers at once.")]
_MaxLength = Annotated[int, typer.Option("--max-length", min=8, help="Tokens of an example; longer ones are cut.")]
_Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Times each example is seen.")]
_Hours = Annotated[
    float | None,
    typer.Option("--hours", min=0.001, help="End after so many hours, sittings taken up with --resume included."),
]
_MaxSteps = Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after so many steps.")]
_BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Examples of a batch, per device.")]
_Accumulation = Annotated[int, typer.Option("--gradient-accumulation", min=1, help="Batches of a step.")]
_LearningRate = Annotated[
    float | None,
    typer.Option("--learning-rate", callback=options.finite, min=0.0, help="Default: 5e-5 (full), 1e-3 (adapter)."),
]
_Warmup = Annotated[
    float,
    typer.Option("--warmup", callback=options.finite, min=0.0, max=1.0, help="Share of steps the rate rises over."),
]
_SaveSteps = Annotated[int, typer.Option("--save-steps", min=1, help="A checkpoint after so many steps.")]
_HeldOut = Annotated[int, typer.Option("--held-out", min=0, help="Prompts kept back to measure on; at most a tenth.")]
_Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory for a third more computing.")
]
_Optimizer = Annotated[str, typer.Option("--optim", help="Optimizer, by transformers' names (paged_adamw_8bit, ...).")]
_ReportTo = Annotated[str, typer.Option("--report-to", help="none, tensorboard or wandb, as Trainer has it.")]
_EarlyStop = Annotated[
    int,
    typer.Option(
        "--early-stop", min=0, help="Stop after N checkpoints without a lower held-out loss, keep the best; 0: never."
    ),
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint of --output.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure a few steps, say what all would take, and leave.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into an --output that is not empty.")]


def train(
    data: _Data,
    output: _Output,
    model: options.Model = None,
    method: _Method = "auto",
    candidates: _Candidates = 5,
    masks: _Masks = "distinct",
    form: _Form = "groups",
    groups: _Groups = None,
    p_sar: _PSar = 0.5,
    mask_loss_weight: _MaskLossWeight = 1.0,
    loss: _Loss = "kl",
    rank: _Rank = None,
    distill: _Distill = "2000",
    temperatures: _Temperatures = "0,0,0.8",
    answer_tokens: _AnswerTokens = 256,
    answer_batch_size: _AnswerBatch = 64,
    template: options.Template = None,
    max_length: _MaxLength = 2048,
    epochs: _Epochs = 2,
    hours: _Hours = None,
    max_steps: _MaxSteps = None,
    batch_size: _BatchSize = 4,
    gradient_accumulation: _Accumulation = 1,
    learning_rate: _LearningRate = None,
    warmup: _Warmup = 0.03,
    save_steps: _SaveSteps = 200,
    held_out: _HeldOut = 32,
    early_stop: _EarlyStop = 0,
    gradient_checkpointing: _Checkpointing = False,
    optim: _Optimizer = "adamw_torch",
    report_to: _ReportTo = "none",
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    dry_run: _DryRun = False,
    limit: _Limit = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = "none",
    models_file: options.ModelsFile = None,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
) -> int:
    """Fine-tune a model so that masks behind its input guess the tokens to come (SAR-SFT)."""
    _check_output(output, resume=resume, overwrite=overwrite)
    _check_form(method, quantization)
    answered = _distill_count(distill)
    warm = _temperatures(temperatures)

    from space_cli.training.data import OWN_DATA, read_examples

    sources = [read_examples(source, limit=limit) for source in dict.fromkeys(data) if source != OWN_DATA]
    _check_names(optim, report_to)

    from space_cli.cli.train_view import training_view
    from space_cli.models.loading import computes_in_bfloat16, load_model
    from space_cli.training.chat_format import rendered
    from space_cli.training.own_data import OwnData
    from space_cli.training.prepare import prepare_examples
    from space_cli.training.run import ANSWER_SHARE, OWN_FILE, Recipe

    # started by `accelerate launch` or torchrun: one device each, and one process that speaks
    process = os.environ.get("LOCAL_RANK")
    view = training_view(quiet=quiet or process not in (None, "0"))
    model = options.named_model(model, quiet=quiet or process not in (None, "0"))
    view.note(f"loading {model}")
    load = partial(
        load_model,
        model,
        weights="dense",
        models_file=models_file,
        device=_own_device(device, process),
        quantization=quantization,
        revision=revision,
    )
    loaded = load(dtype=dtype)
    chosen = _method(loaded, method, quantization)
    if chosen == "adapter" and dtype == "auto" and loaded.device == "cpu" and computes_in_bfloat16():
        # several times as fast, and what is trained is kept in float32 all the same
        loaded = load(dtype="bfloat16")
    template = template or loaded.prompt_template
    length = min(max_length, loaded.context_length or max_length)
    examples = [example for source in sources for example in source.examples]
    if OWN_DATA in data:
        own = OwnData(
            count=_DRY_QUESTIONS if dry_run else answered or _OWN_QUESTIONS,
            answer_tokens=min(answer_tokens, length),
            batch_size=answer_batch_size,
            seed=seed,
            seconds=None if hours is None else hours * 3600 * ANSWER_SHARE,
        )
        examples += _own_examples(loaded, own, template, None if dry_run else output / OWN_FILE, view)
    prepared = prepare_examples(
        examples, loaded.tokenizer, template=template, max_length=length, held_out=held_out, seed=seed
    )
    recipe = Recipe(
        method=chosen,
        candidates=candidates,
        distinct_masks=masks == "distinct",
        form=form,
        groups=groups or _GROUPS[chosen],
        p_sar=p_sar,
        mask_loss_weight=mask_loss_weight,
        loss=loss,
        rank=rank,
        distill=answered,
        temperatures=warm,
        answer_tokens=min(answer_tokens, length),
        answer_batch_size=answer_batch_size,
        epochs=epochs,
        early_stop=early_stop,
        hours=hours,
        seed=seed,
        arguments={
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation,
            "learning_rate": _LEARNING_RATES[chosen] if learning_rate is None else learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": warmup,
            "max_steps": max_steps or (-1 if hours is None else _ENDLESS),
            "save_steps": save_steps,
            "save_total_limit": 2,
            "logging_steps": 10,
            "activation_checkpointing": gradient_checkpointing,
            "optim": optim,
            "report_to": report_to,
            "bf16": loaded.dtype == "bfloat16",
        },
    )
    for source in sources:
        view.note(source.told)
    view.example(rendered(examples[0], loaded.tokenizer, template=template))
    view.begin(loaded, prepared, recipe)
    if dry_run:
        from space_cli.training.dry_run import dry_run as do_dry_run

        view.show_dry_run(do_dry_run(loaded, prepared, recipe, base_model=_base_name(model, loaded)))
        return 0
    space = _trained(loaded, prepared, recipe, _base_name(model, loaded), output, resume=resume, view=view)
    if process in (None, "0"):
        view.conclude(space, output)
    return 0


def _trained(
    loaded: LoadedModel,
    prepared: Prepared,
    recipe: Recipe,
    base_model: str,
    output: Path,
    *,
    resume: bool,
    view: TrainView,
) -> SpaceConfig:
    """Train; where that ends early, say what is kept and how to go on."""
    from space_cli.training.run import train

    try:
        with view:
            return train(loaded, prepared, recipe, base_model=base_model, output=output, resume=resume, view=view)
    except UsageProblem:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted", hint=_kept(output)) from error
    except Exception as error:
        error.add_note(_kept(output))
        raise


def _own_examples(
    loaded: LoadedModel, settings: OwnData, template: str | None, file: Path | None, view: TrainView
) -> list[Conversation]:
    """Return what the model asks itself and answers, kept in a file or, for a dry run, nowhere."""
    from space_cli.training.own_data import own_examples

    with TemporaryDirectory() as folder:
        return own_examples(
            loaded,
            settings,
            template=template,
            file=Path(folder, "dry.jsonl") if file is None else file,
            on_progress=lambda done, total, rate: view.phase("questions of its own", done, total, rate),
        )


def _kept(output: Path) -> str:
    """Say what an ending training leaves, and how to go on."""
    from space_cli.training.trainer import complete_checkpoints

    newest = next(iter(complete_checkpoints(output)), None)
    kept = f"{newest} is kept" if newest else "no checkpoint was written yet"
    return f"{kept}; the same command with --resume goes on"


def _check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageProblem(f"--output {output}: is a file", hint="give a folder")
    if resume and not output.is_dir():
        raise UsageProblem(f"--output {output}: no training to resume", hint="leave --resume out")
    if output.is_dir() and any(output.iterdir()) and not (resume or overwrite):
        raise UsageProblem(f"--output {output}: is not empty", hint="give --resume to go on with it, or --overwrite")


def _check_form(method: str, quantization: str) -> None:
    if method == "full" and quantization != "none":
        raise UsageProblem("--method full cannot train quantised weights", hint="use --method adapter")


def _check_names(optim: str, report_to: str) -> None:
    from space_cli.cli.console import quiet_libraries

    quiet_libraries()

    from space_cli.training.choices import check_names

    check_names(optim=optim, report_to=report_to)


def _own_device(device: str, process: str | None) -> str:
    """Return the device of this process where several were started."""
    import torch

    if process is None or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{process}"


def _distill_count(distill: str) -> int:
    if distill == "off":
        return 0
    if not distill.isdigit():
        raise UsageProblem(f"--distill {distill}: neither a number nor off", hint="give the number of prompts, or off")
    return int(distill)


def _temperatures(told: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in told.split(","))
    except ValueError as error:
        raise UsageProblem(f"--temperatures {told}: not numbers", hint="give them as 0,0.8") from error
    if any(not 0 <= temperature < 100 for temperature in found):
        raise UsageProblem(f"--temperatures {told}: out of range", hint="0 is greedy, 1 the model's own distribution")
    return found


def _method(loaded: LoadedModel, method: str, quantization: str) -> Method:
    if method == "full" or method == "adapter":
        return "full" if method == "full" else "adapter"
    large = loaded.num_parameters > _ADAPTER_ABOVE
    has_adapter = loaded.space is not None and loaded.space.method == "adapter"
    return "adapter" if large or has_adapter or quantization != "none" or loaded.gguf else "full"


def _base_name(model: str, loaded: LoadedModel) -> str:
    """Return the base's name as a checkpoint elsewhere will find it: folders and files by their full path."""
    from space_cli.models.registry import located

    if loaded.space is not None and loaded.space.method == "adapter" and loaded.space.base_model is not None:
        return loaded.space.base_model
    return located(model)

"""`space train`: fine-tune a model for SPACE, all weights or an adapter."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field, field_validator

from space_cli.cli import options
from space_cli.cli.groups import Group, grouped
from space_cli.errors import Interrupted, UsageProblem

if TYPE_CHECKING:
    from space_cli.cli.train_view import TrainView
    from space_cli.models.checkpoint import SpaceConfig
    from space_cli.models.loading import LoadedModel
    from space_cli.training.data import Conversation, Loaded
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

_Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of shuffling, masks and sampling.")]


class DataOptions(Group):
    """What is learnt."""

    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="A .jsonl, .json, .parquet, .csv or .txt file (.gz too), a Hub dataset id, or self: the model asks"
            " itself; repeatable.",
            metavar="DATA",
        ),
    ]
    limit: Annotated[
        int | None, Field(ge=1), typer.Option("--limit", "-L", help="Only the first N examples of each source.")
    ] = None

    def read(self) -> list[Loaded]:
        """Return the examples of each source but the model itself."""
        from space_cli.training.data import OWN_DATA, read_examples

        return [read_examples(source, limit=self.limit) for source in dict.fromkeys(self.data) if source != OWN_DATA]


class OutputOptions(Group):
    """Where the checkpoint goes."""

    output: Annotated[Path, typer.Option("--output", "-o", callback=options.at_home, help="Folder of the checkpoint.")]
    resume: bool = Field(False, description="Go on from the newest whole checkpoint of --output.")
    overwrite: bool = Field(False, description="Write into an --output that is not empty.")

    dry_run: bool = Field(False, description="Measure a few steps, say what all would take, and leave.")

    def check(self) -> None:
        """Refuse a place that holds something else.

        Raises:
            UsageProblem: it does.
        """
        output = self.output
        if output.exists() and not output.is_dir():
            raise UsageProblem(f"--output {output}: is a file", hint="give a folder")
        if self.resume and not output.is_dir():
            raise UsageProblem(f"--output {output}: no training to resume", hint="leave --resume out")
        if output.is_dir() and any(output.iterdir()) and not (self.resume or self.overwrite):
            raise UsageProblem(
                f"--output {output}: is not empty", hint="give --resume to go on with it, or --overwrite"
            )


class MethodOptions(Group):
    """What is trained, and on which loss."""

    method: Literal["auto", "full", "adapter"] = Field(
        "auto",
        description="full: all weights. adapter: the base stays as it is. auto: adapter from 1B on or over quantised"
        " weights.",
    )
    candidates: int = Field(5, ge=1, le=31, description="k, and masks of a group.")
    masks: Literal["distinct", "single"] = Field(
        "distinct", description="One mask id per position, or one for all (paper)."
    )
    form: Literal["groups", "paper"] = Field(
        "groups", description="groups: several mask groups ride along in each example. paper: one, with --p-sar."
    )
    groups: int | None = Field(None, ge=1, description="Mask groups of an example. Default: 8 (full), 48 (adapter).")
    p_sar: float = Field(0.5, ge=0, le=1, description="Share of examples with masks (--form paper).")
    mask_loss_weight: float = Field(1.0, ge=0, description="Weight of a mask's loss relative to a token's.")
    loss: Literal["kl", "ce"] = Field(
        "kl", description="Of an adapter. kl: the base's distribution at each position. ce: the token there."
    )
    rank: int | None = Field(None, ge=1, description="Of an adapter's low-rank weights; 32, or that of the one it has.")
    bigram: int = Field(
        32,
        ge=0,
        description="Rank of what a token says of the next one, which ties the guesses of a new adapter's masks; 0 for"
        " none.",
    )

    def chosen(self, loaded: LoadedModel, quantization: str) -> Method:
        """Return the method, auto decided by the model."""
        if self.method != "auto":
            return self.method
        large = loaded.num_parameters > _ADAPTER_ABOVE
        has_adapter = loaded.space is not None and loaded.space.method == "adapter"
        return "adapter" if large or has_adapter or quantization != "none" or loaded.gguf else "full"


class AnswerOptions(Group):
    """What the base answers itself, to learn from."""

    distill: Annotated[
        str,
        typer.Option(
            "--distill", help="Prompts that the base answers itself, to learn from; off for none.", metavar="N|off"
        ),
    ] = "2000"
    temperatures: str = Field("0,0,0.8", description="Of those answers, in turn; 0 is greedy.")
    answer_tokens: int = Field(256, ge=2, description="Most tokens of such an answer.")
    answer_batch_size: int = Field(64, ge=1, description="Prompts the base answers at once.")

    @field_validator("distill")
    @classmethod
    def _is_count(cls, distill: str) -> str:
        if distill != "off" and not distill.isdigit():
            raise ValueError("neither a number nor off")
        return distill

    @field_validator("temperatures")
    @classmethod
    def _are_temperatures(cls, temperatures: str) -> str:
        try:
            found = [float(part) for part in temperatures.split(",")]
        except ValueError as error:
            raise ValueError("not numbers; give them as 0,0.8") from error
        if any(not 0 <= temperature < 100 for temperature in found):
            raise ValueError("out of range; 0 is greedy, 1 the model's own distribution")
        return temperatures

    @property
    def count(self) -> int:
        """How many prompts the base answers."""
        return 0 if self.distill == "off" else int(self.distill)

    @property
    def parsed_temperatures(self) -> tuple[float, ...]:
        """The temperatures, in turn."""
        return tuple(float(part) for part in self.temperatures.split(","))


class StepOptions(Group):
    """The steps of a training: how many, of what, and what is kept of them."""

    max_length: int = Field(2048, ge=8, description="Tokens of an example; longer ones are cut.")
    epochs: int = Field(2, ge=1, description="Times each example is seen.")
    hours: float | None = Field(
        None, ge=0.001, description="End after so many hours, sittings taken up with --resume included."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps.")
    batch_size: int = Field(4, ge=1, description="Examples of a batch, per device.")
    gradient_accumulation: int = Field(1, ge=1, description="Batches of a step.")
    learning_rate: float | None = Field(None, ge=0, description="Default: 5e-5 (full), 1e-3 (adapter).")
    warmup: float = Field(0.03, ge=0, le=1, description="Share of steps the rate rises over.")
    save_steps: int = Field(200, ge=1, description="A checkpoint after so many steps.")
    held_out: int = Field(32, ge=0, description="Prompts kept back to measure on; at most a tenth.")
    early_stop: int = Field(
        0, ge=0, description="Stop after N checkpoints without a lower held-out loss, keep the best; 0: never."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory for a third more computing.")
    optim: str = Field("adamw_torch", description="Optimizer, by transformers' names (paged_adamw_8bit, ...).")
    report_to: str = Field("none", description="none, tensorboard or wandb, as Trainer has it.")

    def arguments(self, loaded: LoadedModel, method: Method) -> dict[str, Any]:
        """Return them as transformers' TrainingArguments has them."""
        return {
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation,
            "learning_rate": _LEARNING_RATES[method] if self.learning_rate is None else self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.warmup,
            "max_steps": self.max_steps or (-1 if self.hours is None else _ENDLESS),
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "logging_steps": 10,
            "activation_checkpointing": self.gradient_checkpointing,
            "optim": self.optim,
            "report_to": self.report_to,
            "bf16": loaded.dtype == "bfloat16",
        }


@grouped
def train(
    *,
    data: DataOptions,
    place: OutputOptions,
    model: options.Model = None,
    method: MethodOptions,
    answers: AnswerOptions,
    template: options.Template = None,
    steps: StepOptions,
    seed: _Seed = 0,
    load: options.LoadOptions,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
) -> int:
    """Fine-tune a model so that masks behind its input guess the tokens to come (SAR-SFT)."""
    began = time.monotonic()
    place.check()
    if method.method == "full" and load.quantization != "none":
        raise UsageProblem("--method full cannot train quantised weights", hint="use --method adapter")

    sources = data.read()
    _check_names(steps.optim, steps.report_to)

    from space_cli.cli.train_view import training_view
    from space_cli.training.chat_format import rendered
    from space_cli.training.data import OWN_DATA
    from space_cli.training.prepare import prepare_examples
    from space_cli.training.run import OWN_FILE

    # under `accelerate launch` or torchrun each process has one device, and only the first prints
    process = os.environ.get("LOCAL_RANK")
    quiet = quiet or process not in (None, "0")
    view = training_view(quiet=quiet)
    model = options.named_model(model, quiet=quiet)
    view.note(f"loading {model}")
    loaded, chosen = _loaded(model, revision, load, method, process)
    template = template or loaded.prompt_template
    length = min(steps.max_length, loaded.context_length or steps.max_length)
    recipe = _recipe(loaded, chosen, method, answers, steps, length=length, seed=seed)
    examples = [example for source in sources for example in source.examples]
    if OWN_DATA in data.data:
        questions = _DRY_QUESTIONS if place.dry_run else recipe.distill or _OWN_QUESTIONS
        file = None if place.dry_run else place.output / OWN_FILE
        examples += _own_examples(loaded, recipe, questions, template, file, view)
    prepared = prepare_examples(
        examples, loaded.tokenizer, template=template, max_length=length, held_out=steps.held_out, seed=seed
    )
    for source in sources:
        view.note(source.summary)
    view.example(rendered(examples[0], loaded.tokenizer, template=template))
    view.begin(loaded, prepared, recipe)
    if place.dry_run:
        from space_cli.training.dry_run import dry_run

        view.show_dry_run(dry_run(loaded, prepared, recipe, base_model=_base_name(model, loaded)))
        return 0
    space = _trained(loaded, prepared, recipe, _base_name(model, loaded), place, view=view, began=began)
    if process in (None, "0"):
        view.conclude(space, place.output)
    return 0


def _recipe(
    loaded: LoadedModel,
    chosen: Method,
    method: MethodOptions,
    answers: AnswerOptions,
    steps: StepOptions,
    *,
    length: int,
    seed: int,
) -> Recipe:
    """Return what the options say, in the words of training."""
    from space_cli.training.run import Recipe

    return Recipe(
        method=chosen,
        distinct_masks=method.masks == "distinct",
        groups=method.groups or _GROUPS[chosen],
        **method.model_dump(include={"candidates", "form", "p_sar", "mask_loss_weight", "loss", "rank"}),
        bigram=method.bigram if (chosen, method.form) == ("adapter", "groups") else 0,
        distill=answers.count,
        temperatures=answers.parsed_temperatures,
        answer_tokens=min(answers.answer_tokens, length),
        answer_batch_size=answers.answer_batch_size,
        **steps.model_dump(include={"epochs", "early_stop", "hours"}),
        seed=seed,
        arguments=steps.arguments(loaded, chosen),
    )


def _loaded(
    model: str, revision: str | None, load: options.LoadOptions, method: MethodOptions, process: str | None
) -> tuple[LoadedModel, Method]:
    """Load the model to train, and decide how it is trained."""
    from space_cli.models.loading import computes_in_bfloat16

    place = load.model_copy(update={"device": _own_device(load.device, process)})
    loaded = place.load(model, revision=revision, weights="dense")
    chosen = method.chosen(loaded, load.quantization)
    if chosen == "adapter" and load.dtype == "auto" and loaded.device == "cpu" and computes_in_bfloat16():
        # several times as fast; the trained weights stay in float32
        loaded = place.load(model, revision=revision, weights="dense", dtype="bfloat16")
    return loaded, chosen


def _trained(
    loaded: LoadedModel,
    prepared: Prepared,
    recipe: Recipe,
    base_model: str,
    place: OutputOptions,
    *,
    view: TrainView,
    began: float,
) -> SpaceConfig:
    """Train; where that ends early, say what is kept and how to go on."""
    from space_cli.training.run import train

    try:
        with view:
            return train(
                loaded,
                prepared,
                recipe,
                base_model=base_model,
                output=place.output,
                resume=place.resume,
                view=view,
                began=began,
            )
    except UsageProblem:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted", hint=_kept(place.output)) from error
    except Exception as error:
        error.add_note(_kept(place.output))
        raise


def _own_examples(
    loaded: LoadedModel, recipe: Recipe, questions: int, template: str | None, file: Path | None, view: TrainView
) -> list[Conversation]:
    """Return what the model asks itself and answers, kept in a file or, for a dry run, nowhere."""
    from space_cli.training.own_data import OwnData, own_examples
    from space_cli.training.run import ANSWER_SHARE

    settings = OwnData(
        count=questions,
        answer_tokens=recipe.answer_tokens,
        batch_size=recipe.answer_batch_size,
        seed=recipe.seed,
        seconds=None if recipe.hours is None else recipe.hours * 3600 * ANSWER_SHARE,
    )
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


def _base_name(model: str, loaded: LoadedModel) -> str:
    """Return the base's name as a checkpoint elsewhere will find it: folders and files by their full path."""
    from space_cli.models.registry import located

    if loaded.space is not None and loaded.space.method == "adapter" and loaded.space.base_model is not None:
        return loaded.space.base_model
    return located(model)

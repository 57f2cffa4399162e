"""A whole training: distillation, steps, acceptance, and the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from space_cli.core.collator import IGNORED, SARCollator
from space_cli.core.stopping import StopRule
from space_cli.errors import UsageProblem
from space_cli.files import atomic_write
from space_cli.models.checkpoint import SpaceConfig
from space_cli.models.loading import LoadedModel
from space_cli.training.acceptance import Acceptance, measure_acceptance
from space_cli.training.card import card, draw_curves
from space_cli.training.distill import Distillation, distil
from space_cli.training.prepare import Method, Prepared, prepare_model
from space_cli.training.start import empty, fitting, identity, mend_generation_config
from space_cli.training.trainer import Epochs, SARTrainer, complete_checkpoints
from space_cli.training.two_pass import Loss, TwoPassTrainer

SETTINGS_FILE, LOG_FILE, ANSWERS_FILE = "training_settings.json", "training.jsonl", "distilled.jsonl"
OWN_FILE = "self.jsonl"
CARD_FILE, CURVES_FILE = "README.md", "training.png"
ANSWER_SHARE = 0.25
"""Of the hours of a training: the most that answers take, those to the data's prompts and to its own each."""
_MEASURED_SHARE = 0.1  # of the hours: the most that the finished masks' measurement takes
_ENDLESS = 10_000  # epochs: the hours end it
# settings that may change when resuming a training by hours
_ADDED_WITH_HOURS = {"hours", "data", "distill", "max_steps"}
_MAX_WORKERS = 12
_FEW_SHAPES = 64  # many batch shapes fragment the allocator's memory


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a training; those that Trainer has are in `arguments`.

    Attributes:
        candidates: k, and masks of a group.
        form: the mask layout of the collator, with `groups` and `p_sar`.
        distill: prompts answered by the base itself; 0 trains on the given answers alone.
        temperatures: of those answers, in turn.
        answer_tokens: most tokens of an answer, in distillation and in measuring.
        answer_batch_size: prompts the base answers at once.
        early_stop: stop when so many evaluations in a row lowered no held-out loss, and keep the best; 0 never stops.
        loss: of an adapter's masks.
        bigram: rank of the tie between an adapter's masks; 0 for none.
        hours: end the training; None leaves it to epochs and steps.
        arguments: of transformers' TrainingArguments.
    """

    method: Method
    candidates: int
    distinct_masks: bool
    form: Literal["groups", "paper"]
    groups: int
    p_sar: float
    mask_loss_weight: float
    loss: Loss
    rank: int | None
    bigram: int
    distill: int
    temperatures: tuple[float, ...]
    answer_tokens: int
    answer_batch_size: int
    epochs: int
    early_stop: int
    hours: float | None
    seed: int
    arguments: dict[str, Any]


class TrainingView(Protocol):
    """Sees a training as it happens."""

    def note(self, text: str) -> None:
        """Something is worth a line."""

    def phase(self, name: str, done: int, total: int, rate: float | None = None) -> None:
        """Show the progress of a phase besides the steps, with its tokens per second."""

    def logged(self, step: int, steps: int, logs: dict[str, float]) -> None:
        """Some steps have ended."""

    def saved(self, folder: Path) -> None:
        """A checkpoint has been written."""


def train(
    loaded: LoadedModel,
    prepared: Prepared,
    recipe: Recipe,
    *,
    base_model: str,
    output: Path,
    resume: bool,
    view: TrainingView,
    began: float | None = None,
) -> SpaceConfig:
    """Train, and write a SPACE checkpoint to `output`; return its config.

    Args:
        loaded: the model.
        prepared: what it learns from.
        recipe: how.
        base_model: what the checkpoint calls its base.
        output: folder of checkpoints and result.
        resume: go on from the newest checkpoint there.
        view: sees it happen.
        began: when the recipe's hours began to count, by `time.monotonic`; None is when the training begins.

    Raises:
        UsageProblem: nothing to resume, or other settings than those of the training to be resumed.
        RunFailed: a file cannot be written.
    """
    processes = PartialState(cpu=loaded.device == "cpu")
    settings = asdict(recipe) | {"data": prepared.fingerprint, "base_identity": identity(loaded)}
    checkpoint = _resumed(output, settings) if resume else None
    if recipe.method == "full" and (mended := mend_generation_config(loaded)):
        view.note(mended)
    if processes.is_main_process:
        _begin(output, loaded, settings, resume=resume)
    before = None
    if loaded.mask_token_ids or recipe.method == "full":  # else its text stays, a token a step
        before = _acceptance(
            loaded, prepared, recipe, loaded.mask_token_ids, min(recipe.candidates, loaded.masks_per_group), view
        )
    with processes.main_process_first():
        # the others then find all answers in the file
        answered = _distilled(loaded, prepared, recipe, settings["base_identity"], output / ANSWERS_FILE, view)
    set_seed(recipe.seed)  # of low-rank weights
    mask_ids = add_masks(loaded, recipe)
    counts = {"base": base_model, "examples": len(prepared.examples), "distilled": len(answered)}
    space = checkpoint_config(recipe, mask_ids, base_model, counts | json.loads(json.dumps(settings)))
    trainer = make_trainer(
        loaded,
        recipe,
        space,
        [*prepared.examples, *answered],
        prepared.held_out_examples,
        output,
        [_Shows(view)],
        began=began,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if _last_is_unmeasured(trainer):
        trainer.evaluate()
    trainer.finish(space, output)
    loaded.model.eval()
    after = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        view.note(f"acceptance is not measured where weights are spread: `space bench --model {output}`")
    else:
        after = _acceptance(loaded, prepared, recipe, mask_ids, recipe.candidates, view)
    # an adapter does not change it, and training it in two passes never computes it
    losses = [row["eval_ar_loss"] for row in trainer.state.log_history if "eval_ar_loss" in row]
    measured = {
        name: acceptance.model_copy(update={"answer_loss": losses[place] if losses else None}).model_dump()
        for name, acceptance, place in (("before", before, 0), ("after", after, -1))
        if acceptance
    }
    space = space.model_copy(update={"acceptance": measured})
    if processes.is_main_process:
        _write(space, trainer.state.log_history, output, view)
    return space


def _begin(output: Path, loaded: LoadedModel, settings: dict[str, Any], *, resume: bool) -> None:
    """Make the folder, empty unless a training goes on in it, and write the settings into it."""
    if not resume:
        empty(output, loaded)
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def _last_is_unmeasured(trainer: SARTrainer) -> bool:
    """Return whether the kept weights' held-out loss still has to be measured."""
    measured_at = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    is_last = measured_at and measured_at[-1] == trainer.state.global_step
    return bool(measured_at) and (trainer.args.load_best_model_at_end or not is_last)


def _write(space: SpaceConfig, history: list[dict[str, float]], output: Path, view: TrainingView) -> None:
    """Write a checkpoint's config, log, card and curves."""
    space.save(output)
    atomic_write(output / LOG_FILE, "".join(json.dumps(row) + "\n" for row in history))
    atomic_write(output / CARD_FILE, card(space, output.name))
    if not draw_curves(history, output / CURVES_FILE):
        view.note(f"no {CURVES_FILE}: pip install 'space-decoding[plot]'")


def add_masks(loaded: LoadedModel, recipe: Recipe) -> list[int]:
    """Add a recipe's masks to a model, in place; return the mask ids."""
    return prepare_model(
        loaded,
        recipe.method,
        masks=recipe.candidates,
        distinct=recipe.distinct_masks,
        rank=recipe.rank,
        bigram=recipe.bigram,
    )


def checkpoint_config(recipe: Recipe, mask_ids: list[int], base_model: str, training: dict[str, Any]) -> SpaceConfig:
    """Return the config of a checkpoint of this recipe."""
    return SpaceConfig(
        method=recipe.method,
        mask_token_ids=mask_ids,
        candidates=recipe.candidates,
        masks_per_group=recipe.candidates,
        base_model=base_model if recipe.method == "adapter" else None,
        training=training,
    )


def _resumed(output: Path, settings: dict[str, Any]) -> Path | None:
    """Return the newest complete checkpoint; None if training was interrupted before the first."""
    try:
        earlier = json.loads((output / SETTINGS_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageProblem(f"{output}: no training to resume", hint="leave --resume out") from error
    now = json.loads(json.dumps(settings))
    then, now = ({**each, **each.get("arguments", {}), "arguments": None} for each in (earlier, now))
    if then.get("base_identity") != now["base_identity"]:
        raise UsageProblem(
            f"{output}: was trained on other weights, in another form or of another revision",
            hint="give the same --model, --revision, --dtype and --quantization, or another --output",
        )
    added = _ADDED_WITH_HOURS if now.get("hours") and then.get("hours") else set()
    for name in now.keys() - added:
        if then.get(name) != now[name]:
            raise UsageProblem(
                f"{output}: was trained with other settings: {name} {then.get(name)} instead of {now[name]}",
                hint="give the same ones, or another --output",
            )
    return next(iter(complete_checkpoints(output)), None)


def _distilled(
    loaded: LoadedModel, prepared: Prepared, recipe: Recipe, base: Any, file: Path, view: TrainingView
) -> list[dict[str, list[int]]]:
    """Return the base's own answers as examples that carry loss on the answer."""
    prompts, too_long = fitting(prepared.prompts, recipe.answer_tokens, loaded.context_length)
    if too_long and recipe.distill:
        view.note(f"{too_long} prompts leave no room for an answer of {recipe.answer_tokens} tokens: not answered")
    prompts = prompts[: recipe.distill]
    if not prompts:
        return []
    settings = Distillation(
        max_new_tokens=recipe.answer_tokens,
        temperatures=recipe.temperatures,
        batch_size=recipe.answer_batch_size,
        seed=recipe.seed,
        fingerprint=json.dumps(base),
        seconds=None if recipe.hours is None else recipe.hours * 3600 * ANSWER_SHARE,
    )
    pairs = distil(
        loaded.model,
        prompts,
        settings,
        eos_token_ids=loaded.eos_token_ids,
        file=file,
        on_progress=lambda done, total, rate: view.phase("answers of the base", done, total, rate),
    )
    return [{"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer} for prompt, answer in pairs]


def _acceptance(
    loaded: LoadedModel,
    prepared: Prepared,
    recipe: Recipe,
    mask_ids: Sequence[int],
    candidates: int,
    view: TrainingView,
) -> Acceptance | None:
    stop = StopRule(recipe.answer_tokens, loaded.eos_token_ids)
    prompts, _ = fitting(prepared.held_out, stop.max_new_tokens, loaded.context_length)
    return measure_acceptance(
        loaded.model,
        prompts,
        mask_token_ids=mask_ids,
        candidates=candidates,
        stop=stop,
        seconds=None if recipe.hours is None else recipe.hours * 3600 * _MEASURED_SHARE,
        on_progress=lambda done, total: view.phase("held-out prompts", done, total),
    )


def make_trainer(
    loaded: LoadedModel,
    recipe: Recipe,
    space: SpaceConfig,
    examples: Sequence[dict[str, list[int]]],
    held_out: Sequence[dict[str, list[int]]],
    output: Path,
    callbacks: list[TrainerCallback],
    *,
    with_masks: bool = True,
    began: float | None = None,
) -> SARTrainer:
    """Return the trainer of a recipe for a model that has its masks.

    Args:
        loaded: the model.
        recipe: how to train.
        space: what the checkpoint says of itself.
        examples: `input_ids` and `labels` each.
        held_out: the like, to measure on before the first step and at every checkpoint; may be empty.
        output: folder of the checkpoints.
        callbacks: of transformers' Trainer.
        with_masks: False trains AR alone, to compare the cost.
        began: see `train`.
    """
    padding = loaded.tokenizer.pad_token_id
    collator = SARCollator(
        mask_token_ids=space.mask_token_ids,
        masks_per_group=space.masks_per_group if with_masks else 0,
        pad_token_id=min(loaded.eos_token_ids, default=0) if padding is None else int(padding),
        mask_layout=recipe.form,
        groups=recipe.groups,
        p_sar=recipe.p_sar,
        seed=recipe.seed,
        pad_to_multiple_of=_FEW_SHAPES,
    )
    arguments = _arguments(loaded, recipe, output, evaluates=bool(held_out))
    stops = [EarlyStoppingCallback(recipe.early_stop)] if recipe.early_stop else []
    two_pass = recipe.method == "adapter" and recipe.form == "groups"
    kind = partial(TwoPassTrainer, loss=recipe.loss) if two_pass else SARTrainer
    return kind(
        collator=collator,
        space=space,
        mask_loss_weight=recipe.mask_loss_weight,
        hours=None if recipe.hours is None else recipe.hours * (1 - _MEASURED_SHARE * bool(held_out)),
        began=began,
        model=loaded.model,
        args=arguments,
        train_dataset=Epochs(examples, epochs=recipe.epochs if recipe.hours is None else _ENDLESS, seed=recipe.seed),
        eval_dataset=Epochs(held_out, epochs=1, seed=recipe.seed) if held_out else None,
        processing_class=loaded.tokenizer,
        callbacks=[*callbacks, *stops],
    )


def _arguments(loaded: LoadedModel, recipe: Recipe, output: Path, *, evaluates: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=1,  # `Epochs` holds them all, in order
        seed=recipe.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=loaded.device == "cpu",
        # laying out the blocks of a batch takes longer than a GPU takes for it
        dataloader_num_workers=0 if loaded.device == "cpu" else min(_MAX_WORKERS, os.cpu_count() or 1),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.arguments["save_steps"],
        eval_on_start=evaluates,
        per_device_eval_batch_size=recipe.arguments["per_device_train_batch_size"],
        load_best_model_at_end=bool(recipe.early_stop or (recipe.hours and evaluates)),
        # a batch whose examples are too short for a group leaves an adapter without a gradient
        ddp_find_unused_parameters=recipe.method == "adapter",
        metric_for_best_model="loss" if recipe.early_stop else "expected_tokens_per_step",
        **recipe.arguments,
    )


class _Shows(TrainerCallback):
    """Forwards Trainer's reports to the view."""

    def __init__(self, view: TrainingView) -> None:
        self._view = view

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Some steps have ended."""
        self._view.logged(state.global_step, state.max_steps, logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint has been written."""
        self._view.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

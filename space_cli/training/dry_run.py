"""A dry run: measures a few steps of the real training to estimate its time and memory."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from space_cli.models.loading import LoadedModel
from space_cli.training.prepare import Prepared
from space_cli.training.run import Recipe, add_masks, checkpoint_config, make_trainer
from space_cli.training.trainer import memory_in_use

_STEPS = 4


@dataclass(frozen=True, slots=True)
class DryRun:
    """Estimate of a training.

    Attributes:
        trained: parameters that are trained, of `parameters`.
        steps: of the whole training; answers of the base are counted in.
        seconds_per_step: measured.
        tokens_per_second: of the examples, with masks riding along; `ar_tokens_per_second` without, if `full`.
        memory_bytes: most that was in use.
    """

    trained: int
    parameters: int
    steps: int
    seconds_per_step: float
    tokens_per_second: float
    ar_tokens_per_second: float | None
    memory_bytes: int


def dry_run(loaded: LoadedModel, prepared: Prepared, recipe: Recipe, *, base_model: str) -> DryRun:
    """Run a few steps with and without masks in a temporary folder.

    The model given is trained by it.
    """
    mask_ids = add_masks(loaded, recipe)
    parameters = list(loaded.model.parameters())
    rates, seconds, memory = {}, {}, 0
    few = {"max_steps": _STEPS, "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
    # without masks an adapter has nothing to learn
    for with_masks in (False, True) if recipe.method == "full" else (True,):
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                loaded,
                replace(recipe, early_stop=0, arguments=recipe.arguments | few),
                checkpoint_config(recipe, mask_ids, base_model, {}),
                prepared.examples,
                [],
                Path(folder),
                [clock],
                with_masks=with_masks,
            )
            trainer.train()
        seconds[with_masks] = clock.seconds_per_step
        rates[with_masks] = trainer.tokens_seen / _STEPS / clock.seconds_per_step
        memory = max(memory, clock.memory)
    a_step = recipe.arguments["per_device_train_batch_size"] * recipe.arguments["gradient_accumulation_steps"]
    examples = (len(prepared.examples) + min(recipe.distill, len(prepared.prompts))) * recipe.epochs
    max_steps = recipe.arguments.get("max_steps", -1)
    return DryRun(
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        parameters=sum(parameter.numel() for parameter in parameters),
        steps=max_steps if max_steps > 0 else math.ceil(examples / a_step),
        seconds_per_step=seconds[True],
        tokens_per_second=rates[True],
        ar_tokens_per_second=rates.get(False),
        memory_bytes=memory,
    )


class _Clock(TrainerCallback):
    """Times steps, the first separately, and samples memory after each."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self.memory = 0

    @property
    def seconds_per_step(self) -> float:
        """Mean of all steps but the first."""
        return (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record time and memory."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.memory = max(self.memory, memory_in_use())
        self._ends.append(time.perf_counter())

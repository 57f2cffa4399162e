"""The trainer: transformers' own, with the losses and measures of semi-autoregressive fine-tuning.

Source: SPACE paper (arXiv 2402.11809), section 3.2: the loss is that of AR and that of the masks together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from space_cli.core.collator import IGNORED, SARCollator, mask_index
from space_cli.core.sampling import mix
from space_cli.models.adapter import adapter_of, load_adapter_weights, save_adapter
from space_cli.models.checkpoint import SPACE_CONFIG_NAME, SpaceConfig
from space_cli.models.loading import unpack
from space_cli.training.schedule import SPENT, HoursSchedule

TRAINER_STATE = "trainer_state.json"


class Epochs(Dataset[dict[str, Any]]):
    """Examples in the order they are seen over all epochs, each epoch shuffled by the seed.

    The order and the anchors of every example follow from its place alone, so that a training taken up again sees what
    it would have seen.
    """

    def __init__(self, examples: Sequence[dict[str, list[int]]], *, epochs: int, seed: int) -> None:
        self._examples, self._epochs, self._seed = examples, epochs, seed
        self._drawn: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self._examples) * self._epochs

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, len(self._examples))
        if self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self._seed, epoch))
            self._drawn = (epoch, torch.randperm(len(self._examples), generator=generator).tolist())
        return {**self._examples[self._drawn[1][place]], "example_index": index}


class SARTrainer(Trainer):
    """Trains a model with mask groups in its examples, all weights or an adapter's.

    Args:
        collator: makes the batches.
        space: what the checkpoint will say of itself.
        mask_loss_weight: of a mask's loss, beside that of a token; an adapter learns masks alone.
        hours: shape the learning rate and end the training; None leaves that to the arguments.
        began: when they began to count, by `time.monotonic`; None is when the training begins.
        **given: as transformers' Trainer takes it.
    """

    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        *,
        collator: SARCollator,
        space: SpaceConfig,
        mask_loss_weight: float,
        hours: float | None = None,
        began: float | None = None,
        **given: Any,
    ) -> None:
        super().__init__(data_collator=collator, **given)
        self._schedule = None if hours is None else HoursSchedule(hours, began)
        if self._schedule is not None:
            self.add_callback(self._schedule)
        self.remove_callback(PrinterCallback)
        # our loss is normalised over all batches of a step by itself
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._space = space
        self._collator = collator
        self._mask_loss_weight = mask_loss_weight
        self._mask_ids = torch.tensor(list(collator.mask_token_ids))
        self._masks = collator.masks_per_group
        self._is_adapter = adapter_of(self.model) is not None
        self._sums = torch.zeros(3, self._masks + 1)
        self._since = time.perf_counter()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over all slots with a label, masks weighted."""
        labels = inputs["labels"][:, 1:]
        # logits of a large vocabulary are most of the memory: only slots that learn get any
        slots = (labels != IGNORED).any(dim=0).nonzero().flatten()
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}, logits_to_keep=slots)
        learns = labels[:, slots] != IGNORED
        logits, targets = outputs.logits[learns].float(), labels[:, slots][learns]
        index = mask_index(inputs["input_ids"], self._mask_ids.to(labels.device), self._masks)[:, slots][learns]
        losses = functional.cross_entropy(logits, targets, reduction="none")
        self._measure(losses.detach(), logits.detach().argmax(dim=-1) == targets, index)
        weights = torch.where(index > 0, self._mask_loss_weight, 0.0 if self._is_adapter else 1.0)
        count = num_items_in_batch if num_items_in_batch is not None else max(1, targets.numel())
        loss = (losses * weights).sum() / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the count is that of all processes, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _measure(self, losses: torch.Tensor, hits: torch.Tensor, index: torch.Tensor) -> None:
        """Add up loss, hits and number of slots, for tokens (0) and each mask of a group."""
        kinds = functional.one_hot(index, self._masks + 1).float()
        # where they are: fetching them would wait for the device at every step
        self._sums = self._sums.to(kinds.device)
        self._sums += torch.stack([losses @ kinds, hits.float() @ kinds, kinds.sum(dim=0)])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the slots' figures since the last log besides Trainer's."""
        if "loss" in logs:
            sums = self._over_processes()
            logs = logs | _shown(sums) | {"tokens_per_second": self._rate(sums), "memory_bytes": memory_in_use()}
            self._sums.zero_()
            if self._schedule is not None:
                logs |= {SPENT: self._schedule.so_far}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate held-out examples, also by kind of slot."""
        training, self._sums = self._sums, torch.zeros_like(self._sums)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            shown = _shown(self._over_processes())
        finally:
            self._sums = training
            unpack(self.model)
        (output.metrics or {}).update({f"eval_{name}": value for name, value in shown.items()})
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Evaluate whole examples.

        The paper layout truncates each at a random anchor, so results would not be comparable.
        """
        if self._collator.mask_layout == "groups":
            return super().get_eval_dataloader(eval_dataset)
        training, self.data_collator = self.data_collator, replace(self._collator, mask_layout="groups")
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def _over_processes(self) -> torch.Tensor:
        return torch.as_tensor(self.accelerator.reduce(self._sums.to(self.accelerator.device))).cpu()

    @property
    def tokens_seen(self) -> float:
        """Tokens with loss since the last log, in this process."""
        return self._sums[2, 0].item()

    def _rate(self, sums: torch.Tensor) -> float:
        """Return tokens with AR loss, or masks of an adapter in two passes, per second since this was last asked."""
        now = time.perf_counter()
        rate = (sums[2, 0] or sums[2].sum()).item() / (now - self._since)
        self._since = now
        return rate

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Schedule the learning rate by hours if hours were given."""
        if self._schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            assert chosen is not None
            self.lr_scheduler = self._schedule.scheduler(chosen)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Keep the order of `Epochs`."""
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save a SPACE checkpoint: the adapter alone, or model and tokenizer; its config last."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self._is_adapter:
            if self.args.should_save:
                save_adapter(self.accelerator.unwrap_model(self.model), folder)
                self.processing_class.save_pretrained(folder)
        else:
            super()._save(str(folder), state_dict)
        if self.args.should_save:
            # a pickle, which nothing here reads
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            self._space.save(folder)

    def finish(self, space: SpaceConfig, output: Path) -> None:
        """Write the trained checkpoint: first into a folder beside the output, then move its files, the config last.

        Raises:
            OSError: it could not be written; checkpoints of the training are untouched.
        """
        self._space = space
        part = output / ".unfinished"
        self.save_model(str(part), _internal_call=True)
        if self.args.should_save:
            files = sorted(part.iterdir(), key=lambda file: file.name == SPACE_CONFIG_NAME)
            for file in files:
                file.replace(output / file.name)
            part.rmdir()

    def _load_best_model(self) -> None:
        if not self._is_adapter:
            super()._load_best_model()
        elif self.state.best_model_checkpoint:
            load_adapter_weights(self.model, Path(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_adapter:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_adapter_weights(model or self.model, Path(resume_from_checkpoint))


def _shown(sums: torch.Tensor) -> dict[str, float]:
    losses, hits, counts = (row.tolist() for row in sums)
    shown = {}
    if counts[0]:
        shown["ar_loss"] = losses[0] / counts[0]
    if sum(counts[1:]):
        accuracies = [hit / count if count else 0.0 for hit, count in zip(hits[1:], counts[1:], strict=True)]
        shown["mask_loss"] = sum(losses[1:]) / sum(counts[1:])
        shown |= {f"mask_accuracy_{number}": value for number, value in enumerate(accuracies, start=1)}
        shown["expected_tokens_per_step"] = expected_tokens_per_step(accuracies)
    return shown


def memory_in_use() -> int:
    """Return the peak bytes in use on a GPU, or this process's resident bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


def expected_tokens_per_step(accuracies: Sequence[float]) -> float:
    """Return 1 + the sum of products of the masks' accuracies: expected tokens per step if masks were independent.

    >>> expected_tokens_per_step([0.5, 0.5])
    1.75
    """
    total = product = 1.0
    for accuracy in accuracies:
        product *= accuracy
        total += product
    return total


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a training, newest first.

    Trainer writes its state last, so one without it was cut off; weights that were damaged afterwards do not open.
    """
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _is_complete(path: Path) -> bool:
    weights = list(path.glob("*.safetensors"))
    try:
        for file in weights:
            with safe_open(file, "pt"):
                pass
        state = json.loads((path / TRAINER_STATE).read_bytes())
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights) and bool(state) and path.name.rpartition("-")[2].isdigit()

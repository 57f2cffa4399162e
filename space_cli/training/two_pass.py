"""Two-pass training of adapters: the text once without gradients, then the masks alone over its keys and values.

An adapter leaves every slot that holds text as the base computes it, so nothing is learned there: the first pass is
plain inference, and leaves the base's own distribution at each position beside keys and values. Only mask groups carry
gradients, and they see what they see in decoding: a prefix in the cache. What is where comes from the same `Block`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch.nn import functional
from transformers import DynamicCache

from space_cli.core.cache import cache_arguments
from space_cli.core.collator import IGNORED, SARCollator
from space_cli.models.adapter import MaskEmbedding, adapter_of
from space_cli.training.fused import fuse_low_rank_layers, training_attention_of
from space_cli.training.trainer import SARTrainer

Loss = Literal["kl", "ce"]
"""kl: a mask learns the base's distribution at its position; ce: the token that stands there."""
DEPTH_DECAY = 0.8
"""Weight of a mask's loss relative to that of the mask before it: a deep one counts only where all before are right."""
_EVEN = 8
# elements of a table of logits worked on at once
_CPU_ELEMENTS, _DEVICE_ELEMENTS = 400_000, 100_000_000


@dataclass
class TwoPassCollator:
    """Batches for `TwoPassTrainer`.

    A batch holds `text_ids` (B, T); and of the mask slots `input_ids`, `position_ids`, `labels` (the token a mask
    should guess, -100 for none) and `depth` (1 to m; 0 is padding), (B, S) each, with `attention_mask` (B, 1, S, T + S)
    bool, True = may attend.

    Attributes:
        blocks: draws the anchors and lays out the block of an example.
    """

    blocks: SARCollator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of `features`, which are those of `SARCollator`."""
        rows = [self.blocks.row(feature) for feature in features]
        tokens = [block.num_tokens for block, _, _ in rows]
        # what pads the text is seen by nothing; attention on a GPU wants tables of even rows
        width = _rounded_up(max(tokens), _EVEN)
        slots = max(1, *(block.num_slots - block.num_tokens for block, _, _ in rows))
        slots = _rounded_up(slots, self.blocks.pad_to_multiple_of)
        own = torch.eye(slots, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
        batch = {
            "text_ids": torch.full((len(rows), width), self.blocks.pad_token_id),
            "input_ids": torch.full((len(rows), slots), self.blocks.mask_token_ids[0]),
            "position_ids": torch.zeros((len(rows), slots), dtype=torch.int64),
            "labels": torch.full((len(rows), slots), IGNORED),
            "depth": torch.zeros((len(rows), slots), dtype=torch.int64),
            "attention_mask": torch.cat([own.new_zeros(len(rows), 1, slots, width), own], dim=3),
        }
        for row, (block, ids, targets) in enumerate(rows):
            count, size = block.num_tokens, block.num_slots - block.num_tokens
            visible = torch.from_numpy(block.visibility[count:])
            batch["text_ids"][row, :count] = torch.tensor(ids[:count])
            batch["input_ids"][row, :size] = torch.tensor(ids[count:])
            batch["position_ids"][row, :size] = block.position_ids(0)[0, count:]
            batch["labels"][row, :size] = torch.tensor(targets[count:])
            batch["depth"][row, :size] = torch.arange(size) % max(1, block.masks) + 1
            batch["attention_mask"][row, 0, :size, :count] = visible[:, :count]
            batch["attention_mask"][row, 0, :size, width : width + size] = visible[:, count:]
        return batch


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class TwoPassTrainer(SARTrainer):
    """Trains an adapter on batches of `TwoPassCollator`.

    Args:
        loss: what masks learn.
        depth_decay: see `DEPTH_DECAY`.
        collator: lays out the blocks.
        **given: as `SARTrainer` takes it.
    """

    def __init__(self, *, loss: Loss, depth_decay: float = DEPTH_DECAY, collator: SARCollator, **given: Any) -> None:
        super().__init__(collator=collator, **given)
        self.data_collator = TwoPassCollator(collator)
        self._loss, self._depth_decay = loss, depth_decay
        fuse_low_rank_layers(self.model)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over all masks with a label, weighted by depth."""
        learns = inputs["labels"] != IGNORED
        positions = inputs["position_ids"]
        slots = torch.unique(positions[learns])
        cache, teacher = self._read_text(model, inputs["text_ids"], slots)
        visible = inputs["attention_mask"]
        # the model's dtype may be that of the adapter's weights
        mask = torch.zeros(visible.shape, dtype=teacher.dtype, device=visible.device)
        with training_attention_of(self.model):
            outputs = model(
                input_ids=inputs["input_ids"],
                position_ids=positions,
                attention_mask=mask.masked_fill_(~visible, torch.finfo(mask.dtype).min),
                **cache_arguments(self.accelerator.unwrap_model(model), cache),
            )
        logits, labels, depth = outputs.logits.flatten(0, 1), inputs["labels"].flatten(), inputs["depth"].flatten()
        weights = self._depth_decay ** (depth - 1).float() * (labels != IGNORED)
        place = None
        if self._loss == "kl":
            row = torch.arange(len(learns), device=slots.device)[:, None]
            place = row * len(slots) + torch.searchsorted(slots, positions).clamp_(max=len(slots) - 1)
        total, losses, hits = _mask_loss(logits, labels, weights, teacher.flatten(0, 1), place)
        embedding = cast(MaskEmbedding, adapter_of(self.model))
        if embedding.bigram is not None:
            # half of the loss stays that of masks by themselves: their most probable tokens are the ones that get tied
            previous = inputs["text_ids"].gather(1, positions.clamp(max=inputs["text_ids"].shape[1] - 1)).flatten()
            tied = embedding.bigram(logits, embedding.text_embeddings, previous, (depth - 1).clamp(min=0))
            of_tied, losses, hits = _mask_loss(tied, labels, weights, teacher.flatten(0, 1), place)
            total = (total + of_tied) / 2
        known = labels != IGNORED
        self._measure(losses[known], hits[known], depth[known])
        loss = total / (num_items_in_batch if num_items_in_batch is not None else max(1, int(learns.sum())))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the count is that of all processes, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _read_text(
        self, model: torch.nn.Module, text_ids: torch.Tensor, slots: torch.Tensor
    ) -> tuple[DynamicCache, torch.Tensor]:
        """Return the cache of a text and the base's (B, len(slots), V) logits at `slots`."""
        # without dropout; bitsandbytes packs 4-bit weights in evaluation mode, through which nothing can be learned
        training = model.training and not getattr(self.model, "is_quantized", False)
        model.train(model.training and not training)
        cache = DynamicCache()
        arguments = cache_arguments(self.accelerator.unwrap_model(model), cache)
        logits = model(input_ids=text_ids, logits_to_keep=slots, **arguments).logits
        model.train(training or model.training)
        return cache, logits


class MaskLoss(torch.autograd.Function):
    """Cross-entropy of rows of logits with a teacher's distributions or with tokens, without a table of float32 logits.

    The gradient is known with the loss, and is made with it, some rows at a time, in the dtype of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        teacher: torch.Tensor,
        place: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the weighted sum, the (S) losses by themselves, and (S) whether the most probable token is the label.

        Args:
            ctx: of autograd.
            logits: (S, V).
            labels: (S) int64; -100 where the weight is 0.
            weights: (S) float32.
            teacher: (N, V) logits.
            place: which row of the teacher each row learns, S of them; None learns the labels.
        """
        gradient, losses, hits = torch.empty_like(logits), torch.empty_like(weights), torch.empty_like(weights)
        tokens = labels.clamp(min=0)[:, None]
        teacher_probs = None if place is None else functional.softmax(teacher, dim=-1)
        # on a CPU the working set stays in the cache
        at_once = max(1, (_CPU_ELEMENTS if logits.device.type == "cpu" else _DEVICE_ELEMENTS) // logits.shape[1])
        for start in range(0, len(logits), at_once):
            some = slice(start, start + at_once)
            scores = logits[some].to(torch.float32, copy=True)
            largest = scores.amax(dim=-1, keepdim=True)
            of_label = scores.gather(1, tokens[some])
            hits[some] = (of_label >= largest).flatten().float()
            target = None if teacher_probs is None or place is None else teacher_probs[place.flatten()[some]]
            mean = of_label if target is None else torch.linalg.vecdot(target.float(), scores)[:, None]
            exponents = scores.sub_(largest).exp_()
            total = exponents.sum(dim=-1, keepdim=True)
            losses[some] = (total.log() + largest - mean).flatten()
            scaled = exponents.mul_(weights[some, None] / total)
            if target is None:
                gradient[some] = scaled.scatter_add_(1, tokens[some], -weights[some, None])
            else:
                gradient[some] = torch.addcmul(scaled, target, weights[some, None], value=-1)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses, hits)
        return losses @ weights, losses, hits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None


_mask_loss = cast(
    Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]], MaskLoss.apply
)  # torch leaves it untyped

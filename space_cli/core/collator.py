"""Semi-autoregressive fine-tuning data (SAR-SFT): mask groups that ride along with ordinary examples.

An example of S tokens is one `Block` without a prefix: a chain of tokens with mask groups behind some of them, the
anchors. A slot at position p learns the token at p + 1, whether it holds a token (AR loss) or a mask (SAR loss).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from space_cli.core.block import Block
from space_cli.core.sampling import mix

IGNORED = -100
"""The label that carries no loss, as in transformers."""


@dataclass
class SARCollator:
    """Batch examples for a Hugging Face causal LM, with mask groups added.

    A feature is a mapping with `input_ids` and, where part of it carries no loss (a prompt), `labels` of the same
    length with -100 there. With an `example_index` in it, its anchors depend on that and the seed alone and not on
    what was collated before, so that an interrupted training goes on with the very same batches. The batch holds
    `input_ids` and `position_ids` (B, S) int64, `attention_mask` (B, 1, S, S) bool, True = may attend, and `labels`
    (B, S) int64 placed as transformers' loss expects them: `labels[:, q + 1]` is what slot q learns, which is why a
    batch is one slot longer than its longest block.

    Attributes:
        mask_token_ids: one id for all masks (the paper) or one per mask of a group ("distinct masks").
        masks_per_group: m.
        pad_token_id: fills shorter rows; padding sees itself alone, so that no row of the attention is empty.
        mask_layout: "groups" puts `groups` groups at random anchors of each example, each blind to the others; "paper"
            cuts the example behind one random anchor and appends one group there, with probability `p_sar`.
        groups: G, at most; an example has no more groups than anchors.
        p_sar: probability that an example gets its group in the "paper" layout (paper, section 4.1: 0.5).
        seed: of the anchors drawn.
        pad_to_multiple_of: rounds S up, for kernels and compilers that want few shapes.

    Source: SPACE paper (arXiv 2402.11809), section 3.2.
    """

    mask_token_ids: Sequence[int]
    masks_per_group: int
    pad_token_id: int
    mask_layout: Literal["groups", "paper"] = "groups"
    groups: int = 8
    p_sar: float = 0.5
    seed: int = 0
    pad_to_multiple_of: int = 1
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mask_layout not in ("groups", "paper"):
            raise ValueError(f"mask_layout must be 'groups' or 'paper', not {self.mask_layout!r}")
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of `features`."""
        rows = [self.row(feature) for feature in features]
        multiple = self.pad_to_multiple_of
        length = -(-(max(block.num_slots for block, _, _ in rows) + 1) // multiple) * multiple
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "position_ids": torch.zeros((len(rows), length), dtype=torch.int64),
            "attention_mask": torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1, 1),
            "labels": torch.full((len(rows), length), IGNORED),
        }
        for row, (block, input_ids, targets) in enumerate(rows):
            size = block.num_slots
            batch["input_ids"][row, :size] = torch.tensor(input_ids)
            batch["position_ids"][row, :size] = block.position_ids(0)[0]
            batch["attention_mask"][row, 0, :size, :size] = torch.from_numpy(block.visibility)
            batch["labels"][row, 1 : size + 1] = torch.tensor(targets)
        return batch

    def row(self, feature: Mapping[str, Any]) -> tuple[Block, list[int], list[int]]:
        """Return the block of one example, the token ids and the labels of its slots."""
        tokens, labels = list(feature["input_ids"]), list(feature.get("labels", feature["input_ids"]))
        example_index = feature.get("example_index")
        if example_index is not None:
            self._generator.manual_seed(mix(self.seed, example_index))
        if not tokens or len(tokens) != len(labels):
            raise ValueError(f"an example needs tokens and as many labels, not {len(tokens)} and {len(labels)}")
        anchors = self._draw_anchors(labels)
        if self.mask_layout == "paper" and anchors:
            tokens = tokens[: anchors[0] + 1]
        block = Block.chain(len(tokens) - 1, self.masks_per_group, anchors=anchors)
        targets = [_target(labels, offset + 1) for offset in block.offsets[: block.num_tokens]]
        for anchor in anchors:
            targets += _mask_targets(labels, anchor, self.masks_per_group)
        return block, tokens + block.mask_token_ids(self.mask_token_ids), targets

    def _draw_anchors(self, labels: list[int]) -> list[int]:
        """Draw anchors whose first mask has a label: the token two positions on carries loss."""
        if not self.masks_per_group:
            return []
        if self.mask_layout == "paper" and torch.rand((), generator=self._generator).item() >= self.p_sar:
            return []
        eligible = [n for n in range(len(labels) - 2) if labels[n + 1] != IGNORED and labels[n + 2] != IGNORED]
        count = 1 if self.mask_layout == "paper" else self.groups
        drawn = torch.randperm(len(eligible), generator=self._generator)[:count].tolist()
        return sorted(eligible[index] for index in drawn)


def mask_index(input_ids: torch.Tensor, mask_token_ids: torch.Tensor, masks_per_group: int) -> torch.Tensor:
    """Return for each slot of a batch which mask of its group it is, counted from 1; 0 for all other slots.

    Args:
        input_ids: (B, S) int64, as the collator makes them: groups stand behind all tokens, one after the other.
        mask_token_ids: (1,) or (m,) int64.
        masks_per_group: m.
    """
    is_mask = torch.isin(input_ids, mask_token_ids)
    first = is_mask.int().argmax(dim=1, keepdim=True)
    slots = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.where(is_mask, (slots - first) % max(1, masks_per_group) + 1, 0)


def _target(labels: list[int], position: int) -> int:
    return labels[position] if position < len(labels) else IGNORED


def _mask_targets(labels: list[int], anchor: int, masks: int) -> list[int]:
    """Return the labels of the masks after `anchor`, ignored from the end of the response on."""
    targets = [_target(labels, anchor + 1 + j) for j in range(1, masks + 1)]
    end = targets.index(IGNORED) if IGNORED in targets else masks
    return targets[:end] + [IGNORED] * (masks - end)

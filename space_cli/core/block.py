"""The block: what one model call gets, and who may see whom in it.

A block is a tree. Its root is the head (the newest certain token), its inner nodes are candidates, and behind the head
and behind candidates hang mask groups, each a chain of m mask slots. Everything else follows from the parents: a slot's
position is its depth, and it sees the committed prefix, its ancestors and itself. The decoder runs such a block behind
a cached prefix; the training collator sees a whole example as one block without a prefix, so that training and decoding
cannot disagree about positions or visibility.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Block:
    """The slots of one model call: head first, then candidates, mask groups last.

    With head and candidates in front, the accepted candidates of a chain already lie in consecutive cache slots, and a
    step ends by moving the cache length back (the published code interleaves and gathers the whole cache instead).

    The chain with k = 1, m = 2 (rows see columns; h head, c candidate, g0 and g1 the mask groups)::

              h  c  g0 g0 g1 g1   position
        h     x                   n
        c     x  x                n + 1
        g0    x     x             n + 1
        g0    x     x  x          n + 2
        g1    x  x        x       n + 2
        g1    x  x        x  x    n + 3

    Attributes:
        candidate_parents: for candidate i (slot i + 1) the slot of its parent: 0 is the head. A parent comes before
            its children.
        masks: m, the number of mask slots in a group.
        anchors: the slots (head or candidate) that have a mask group behind them, ascending.

    Source: SPACE paper (arXiv 2402.11809), section 3.3; trees as in Medusa (arXiv 2401.10774), section 2.1.2.
    """

    candidate_parents: tuple[int, ...]
    masks: int
    anchors: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.masks < 0:
            raise ValueError(f"a mask group cannot have {self.masks} masks")
        for candidate, parent in enumerate(self.candidate_parents, start=1):
            if not 0 <= parent < candidate:
                raise ValueError(f"candidate slot {candidate} has parent {parent}; a parent comes before its children")
        if any(not 0 <= anchor <= self.num_candidates for anchor in self.anchors):
            raise ValueError(f"mask groups stand behind the head or a candidate, not behind slots {self.anchors}")
        if list(self.anchors) != sorted(set(self.anchors)):
            raise ValueError(f"anchors must ascend without repeats: {self.anchors}")

    @classmethod
    def chain(cls, candidates: int, masks: int, *, anchors: Iterable[int] | None = None) -> Block:
        """Return the paper's block: `candidates` in a row, a group of `masks` behind the head and each of them.

        >>> Block.chain(5, 5).num_slots
        36
        """
        return cls.tree(range(candidates), masks, anchors=anchors)

    @classmethod
    def tree(cls, parents: Iterable[int], masks: int, *, anchors: Iterable[int] | None = None) -> Block:
        """Return a token-tree block; `parents[i]` is the slot (0 = head) that candidate slot i + 1 follows."""
        candidate_parents = tuple(parents)
        everywhere = range(len(candidate_parents) + 1) if masks else ()
        return cls(candidate_parents, masks, tuple(everywhere if anchors is None else anchors))

    @cached_property
    def num_candidates(self) -> int:
        """Number of candidate slots; they are slots 1 to this number."""
        return len(self.candidate_parents)

    @cached_property
    def num_tokens(self) -> int:
        """Number of slots that hold tokens (head and candidates)."""
        return self.num_candidates + 1

    @cached_property
    def num_slots(self) -> int:
        """Q, the number of slots."""
        return self.num_tokens + len(self.anchors) * self.masks

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent slot of each slot; -1 for the head."""
        parents = [-1, *self.candidate_parents]
        for anchor in self.anchors:
            first = len(parents)
            parents += [anchor, *range(first, first + self.masks - 1)][: self.masks]
        return tuple(parents)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of each slot less the head's: its depth in the tree."""
        offsets = [0] * self.num_slots
        for slot, parent in enumerate(self.parents[1:], start=1):
            offsets[slot] = offsets[parent] + 1
        return tuple(offsets)

    @cached_property
    def offset_ids(self) -> np.ndarray:
        """(Q) int64, the offsets once more."""
        return np.array(self.offsets, dtype=np.int64)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Candidate slots that follow each token slot."""
        children: list[list[int]] = [[] for _ in range(self.num_tokens)]
        for candidate, parent in enumerate(self.candidate_parents, start=1):
            children[parent].append(candidate)
        return tuple(tuple(row) for row in children)

    @cached_property
    def _groups(self) -> dict[int, range]:
        starts = range(self.num_tokens, self.num_slots, self.masks) if self.masks else ()
        return {anchor: range(start, start + self.masks) for anchor, start in zip(self.anchors, starts, strict=False)}

    def group(self, anchor: int) -> range:
        """Return the mask slots behind token slot `anchor`; empty where it has no group."""
        return self._groups.get(anchor, range(0))

    def mask_token_ids(self, mask_token_ids: Sequence[int]) -> list[int]:
        """Return the token id of each mask slot: one shared id, or the j-th id for the j-th mask of each group."""
        if len(mask_token_ids) == 1:
            group = list(mask_token_ids) * self.masks
        elif len(mask_token_ids) >= self.masks:
            group = list(mask_token_ids[: self.masks])
        else:
            raise ValueError(f"{self.masks} masks in a group need 1 or {self.masks} ids, not {len(mask_token_ids)}")
        return group * len(self.anchors)

    @cached_property
    def visibility(self) -> np.ndarray:
        """(Q, Q) bool, True where the row's slot may attend to the column's: ancestors and itself."""
        visible = np.zeros((self.num_slots, self.num_slots), dtype=bool)
        for slot, parent in enumerate(self.parents):
            if parent >= 0:
                visible[slot] = visible[parent]
            visible[slot, slot] = True
        return visible

    def position_ids(self, prefix_length: int) -> torch.Tensor:
        """Return (1, Q) int64 positions for a head at position `prefix_length`, the number of committed tokens."""
        return torch.from_numpy(self.offset_ids)[None] + prefix_length

    def attention_mask(
        self,
        prefix_length: int,
        *,
        num_keys: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Return the (1, 1, Q, N) additive mask: 0 where a slot may attend, the lowest number of the dtype elsewhere.

        Every slot sees the whole prefix. Eager attention takes no boolean mask, and SDPA on CPU would turn one into
        this in every layer.

        Args:
            prefix_length: L.
            num_keys: N, L + Q by default; nothing sees the keys behind the block.
            dtype: of the model.
            device: of the model.
        """
        end = prefix_length + self.num_slots
        shape = (1, 1, self.num_slots, end if num_keys is None else num_keys)
        mask = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=device)
        mask[..., :prefix_length] = 0
        mask[..., prefix_length:end].masked_fill_(torch.from_numpy(self.visibility).to(device), 0)
        return mask


AR_BLOCK = Block.chain(0, 0)
"""The block of plain autoregressive decoding: the head alone."""

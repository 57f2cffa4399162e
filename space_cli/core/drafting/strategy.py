"""Builds each block to maximise expected tokens per second, from masks and from texts to copy.

A candidate, or a mask group behind one, gets a slot while the tokens that it can be expected to bring are worth more
than its time; where nothing is, the step is plain AR.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.choose import Rows
from space_cli.core.costs import MOST_SLOTS, SIZES
from space_cli.core.drafting.acceptance import AcceptanceStats
from space_cli.core.drafting.chain import Proposal, Verified
from space_cli.core.drafting.ngrams import Continuation, NgramIndex, Source
from space_cli.core.drafting.tree import Node, TokenTree, most_worth


@dataclass(frozen=True)
class Strategy:
    """What drafts are made of; docs/drafts.md has the ablation.

    Attributes:
        width: how many tokens of each mask may become candidates; 0 does without masks.
        copies: whether text is copied.
        memory: whether past answers are copied.
    """

    width: int = 4
    copies: bool = True
    memory: bool = True


EVERYTHING = Strategy()


class AdaptiveDrafter:
    """Builds each block anew.

    Args:
        stats: of generations before, which this one goes on from and adds to.
        masks: m, the longest mask group; 0 for none.
        strategy: what drafts are made of.
        texts: token ids to copy from besides the context, as an answer that is expected.
        sources: of more text to copy from, which do not change meanwhile.
    """

    max_slots = MOST_SLOTS

    def __init__(
        self,
        stats: AcceptanceStats,
        masks: int,
        strategy: Strategy = EVERYTHING,
        *,
        texts: Iterable[Sequence[int]] = (),
        sources: Sequence[Source] = (),
    ) -> None:
        self._stats, self._strategy = stats, strategy
        self._masks = masks if strategy.width else 0
        self._context, self._sources = NgramIndex(texts), sources

    def draft(self, tokens: Sequence[int], rows: Rows | None = None, group: range = range(0)) -> Proposal:
        """Propose what is worth its time behind `tokens`; see `Drafter`."""
        texts = self._texts(tokens) if self._strategy.copies else []
        masks = self._masks if self._stats.masks.is_good else 0
        if self._stats.is_plain_due or not (masks or texts):
            return Proposal(AR_BLOCK, (), texts=texts)
        asked = rows.likely(group, tokens, self._strategy.width) if rows is not None and masks and group else []
        tree = TokenTree(asked, texts, self._stats.copy_probability)
        # a node whose gain is below the cheapest slot's cost may only fill a free padding slot
        tree.grow(self._stats.cheapest, MOST_SLOTS - 1)
        taken, masks, anchors = most_worth(tree.nodes, self._stats.values[:masks], self._stats.prices)
        slots = 1 + taken + masks * len(anchors)
        taken += next(size for size in SIZES if size >= slots) - slots
        tree.grow(0.0, taken)
        nodes = tree.nodes[:taken] + [Node(tokens[-1], 0, 1, 0.0)] * (taken - len(tree.nodes))
        block = _block(tuple(node.parent for node in nodes), masks, tuple(anchors))
        return Proposal(block, [node.token for node in nodes], asked, texts)

    def observe(self, step: Verified) -> None:
        """Learn from a step."""
        self._stats.add(step)

    def _texts(self, tokens: Sequence[int]) -> list[Continuation]:
        self._context.extend(tokens)
        found = self._context.lookup(tokens)
        for source in self._sources:
            found += source.lookup(tokens)
        return sorted(found, key=lambda text: -text.match)


@lru_cache(maxsize=4096)
def _block(parents: tuple[int, ...], masks: int, anchors: tuple[int, ...]) -> Block:
    """Return a block; the same shapes come again and again, and their tables with them."""
    return Block(parents, masks, anchors) if parents or anchors else AR_BLOCK

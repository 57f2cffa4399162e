"""Builds each block to maximise expected tokens per second, from masks and from texts to copy.

A candidate, or a mask group behind one, gets a slot while the tokens that it can be expected to bring are worth more
than its time; where nothing is, the step is plain AR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.costs import MAX_BLOCK_SLOTS, SIZES
from space_cli.core.drafting.acceptance import AcceptanceStats
from space_cli.core.drafting.chain import Proposal, Verified
from space_cli.core.drafting.guesses import Bigram, Guesses
from space_cli.core.drafting.ngrams import LONGEST_MATCH, MAX_COPIED, Continuation, NgramIndex, Source
from space_cli.core.drafting.tree import Node, TokenTree, most_worth
from space_cli.core.sampling import TOP_K, StepLogits


@dataclass(frozen=True)
class Strategy:
    """What drafts are made of; docs/drafts.md has the ablation.

    Attributes:
        width: how many tokens of each mask may become candidates; 0 does without masks.
        tie: whether guesses are tied to the token in front of them, where a bigram was trained.
        copies: whether text is copied.
        memory: whether past answers are copied.
    """

    width: int = 4
    tie: bool = True
    copies: bool = True
    memory: bool = True


EVERYTHING = Strategy()


class Guide(Protocol):
    """What a grammar knows of the tokens to come."""

    def forced(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that must follow `tokens`, where there is no choice."""

    def allowed(self, tokens: Sequence[int], following: Sequence[int]) -> int:
        """Return how many of the tokens `following` may follow `tokens`."""


class AdaptiveDrafter:
    """Builds each block anew.

    Args:
        stats: of generations before, which this one goes on from and adds to.
        masks: m, the longest mask group; 0 for none.
        strategy: what drafts are made of.
        bigram: ties the masks' guesses; None where none was trained.
        texts: token ids to copy from besides the context, as an answer that is expected.
        sources: of more text to copy from.
        guide: candidates are what it allows; None allows everything.
    """

    max_slots = MAX_BLOCK_SLOTS

    def __init__(
        self,
        stats: AcceptanceStats,
        masks: int,
        strategy: Strategy = EVERYTHING,
        *,
        bigram: Bigram | None = None,
        texts: Iterable[Sequence[int]] = (),
        sources: Sequence[Source] = (),
        guide: Guide | None = None,
    ) -> None:
        self._stats, self._strategy = stats, strategy
        self._masks = masks if strategy.width else 0
        self._bigram = bigram if strategy.tie else None
        self._context, self._sources, self._guide = NgramIndex(texts), sources, guide

    def draft(self, tokens: Sequence[int], step_logits: StepLogits | None = None, group: range = range(0)) -> Proposal:
        """Propose what is worth its time behind `tokens`; see `Drafter`."""
        texts = self._texts(tokens) if self._strategy.copies else []
        masks = self._masks if self._stats.masks.is_good else 0
        allows: Callable[[list[int]], bool] | None = None
        if self._guide is not None:
            texts, allows = self._guided(self._guide, tokens, texts)
        if self._stats.is_plain_due or not (masks or texts):
            return Proposal(AR_BLOCK, (), texts=texts)
        guesses = None
        if step_logits is not None and masks and group:
            count = self._strategy.width if self._bigram is None else TOP_K
            guesses = Guesses(*step_logits.top_k(group, tokens, count), self._strategy.width, self._bigram)
        tree = TokenTree(tokens[-1], guesses, texts, self._stats.copy_probability, allows)
        # a node whose gain is below the cheapest slot's cost may only fill a free padding slot
        tree.grow(self._stats.cheapest, MAX_BLOCK_SLOTS - 1)
        taken, masks, anchors = most_worth(
            tree.nodes, self._stats.values[:masks], self._stats.prices, self._stats.mask_factor
        )
        slots = 1 + taken + masks * len(anchors)
        taken += next(size for size in SIZES if size >= slots) - slots
        tree.grow(0.0, taken)
        nodes = tree.nodes[:taken] + [Node(tokens[-1], 0, 1, 0.0)] * (taken - len(tree.nodes))
        block = _block(tuple(node.parent for node in nodes), masks, tuple(anchors))
        return Proposal(
            block, [node.token for node in nodes], () if guesses is None else guesses.chain(tokens[-1]), texts
        )

    def _guided(
        self, guide: Guide, tokens: Sequence[int], texts: Sequence[Continuation]
    ) -> tuple[list[Continuation], Callable[[list[int]], bool]]:
        """Return the texts as far as the guide allows them, or what it forces, and its verdict on paths."""
        forced = guide.forced(tokens)
        if forced:
            texts = [Continuation(LONGEST_MATCH, forced[:MAX_COPIED])]
        else:
            held = [guide.allowed(tokens, text.tokens) for text in texts]
            texts = [
                text._replace(tokens=text.tokens[:count]) for text, count in zip(texts, held, strict=True) if count
            ]
        return list(texts), lambda path: guide.allowed(tokens, path) == len(path)

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

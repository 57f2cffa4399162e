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
        self._stats, self._width, self._guide = stats, strategy.width, guide
        self._masks = masks if strategy.width else 0
        self._bigram = bigram if strategy.tie else None
        self._context = NgramIndex(texts)
        self._sources: Sequence[Source] = [self._context, *sources] if strategy.copies else []

    def draft(self, tokens: Sequence[int], step_logits: StepLogits | None = None, group: range = range(0)) -> Proposal:
        """Propose what is worth its time behind `tokens`; see `Drafter`."""
        stats, texts = self._stats, self._texts(tokens)
        masks = self._masks if stats.has_credit else 0
        if stats.is_plain_due or not (masks or texts):
            return Proposal(AR_BLOCK, (), texts=texts)
        guesses = None
        if step_logits is not None and masks and group:
            count = self._width if self._bigram is None else TOP_K
            guesses = Guesses(*step_logits.top_k(group, tokens, count), self._width, self._bigram)
        tree = TokenTree(tokens[-1], guesses, texts, stats.copy_probability, self._allows(tokens))
        # a node whose gain is below the cheapest slot's cost may only fill a free padding slot
        tree.grow(stats.cheapest, MAX_BLOCK_SLOTS)
        taken, masks, anchors = most_worth(tree.nodes, stats.values[:masks], stats.prices, stats.mask_factor)
        slots = taken + masks * len(anchors)
        taken += next(size for size in SIZES if size >= slots) - slots
        tree.grow(0.0, taken)
        candidates = (tree.nodes + [Node(tokens[-1])] * taken)[1:taken]
        block = _block(tuple(node.parent for node in candidates), masks, tuple(anchors))
        chain = () if guesses is None else guesses.chain(tokens[-1])
        return Proposal(block, [node.token for node in candidates], chain, texts)

    def observe(self, step: Verified) -> None:
        """Learn from a step."""
        self._stats.add(step)

    def _texts(self, tokens: Sequence[int]) -> list[Continuation]:
        """Return what could be copied, the longest match first: what a guide forces, or as far as it allows."""
        self._context.extend(tokens)
        found = [text for source in self._sources for text in source.lookup(tokens)]
        found.sort(key=lambda text: -text.match)
        if self._guide is None:
            return found
        if forced := self._guide.forced(tokens):
            return [Continuation(LONGEST_MATCH, forced[:MAX_COPIED])]
        allowed = [text._replace(tokens=text.tokens[: self._guide.allowed(tokens, text.tokens)]) for text in found]
        return [text for text in allowed if text.tokens]

    def _allows(self, tokens: Sequence[int]) -> Callable[[list[int]], bool] | None:
        """Return whether the guide, if any, allows what would follow `tokens`."""
        guide = self._guide
        return None if guide is None else lambda path: guide.allowed(tokens, path) == len(path)


_block = lru_cache(maxsize=4096)(Block)
"""The same shapes come again and again, and their tables with them."""

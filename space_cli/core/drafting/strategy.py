"""Builds each block to bring most tokens per second, from masks and from text that was there before.

A candidate, or a mask group behind one, gets a slot while the tokens that it can be expected to bring are worth more
than its time; where nothing is, the step is plain AR. What drafts may lose where they do not pay is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.choose import Rows
from space_cli.core.costs import MOST_SLOTS, SIZES
from space_cli.core.drafting.acceptance import MAX_PROBABILITY, AcceptanceStats, Snapshot
from space_cli.core.drafting.chain import Proposal, Verified
from space_cli.core.drafting.ngrams import Continuation, NgramIndex, Source
from space_cli.core.drafting.tree import Node, TokenTree, placed

_MIN_PROBABILITY = 0.01


@dataclass(frozen=True)
class Strategy:
    """What drafts are made of; each part less is a row of the ablation in docs/drafts.md.

    Attributes:
        masks: whether mask groups are used.
        width: how many tokens of each mask may become candidates; 1 makes chains.
        copies: whether text is copied.
        calibrated: whether the masks' probabilities are corrected by what was accepted.
        memory: whether text beyond the context is copied too.
    """

    masks: bool = True
    width: int = 4
    copies: bool = True
    calibrated: bool = True
    memory: bool = True


EVERYTHING = Strategy()


class AdaptiveDrafter:
    """Builds each block to maximise expected tokens per second.

    Args:
        stats: of generations before, which this one goes on from and adds to.
        masks: m, the longest mask group; 0 drafts without masks.
        strategy: what drafts are made of.
        texts: token ids to copy from besides the context, as an answer that is expected.
        sources: of more text to copy from; shared, not changed.
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
        self._masks = masks if strategy.masks else 0
        self._context = NgramIndex(texts if strategy.memory else ())
        self._sources = sources if strategy.memory else ()

    def draft(self, tokens: Sequence[int], rows: Rows | None = None, group: range = range(0)) -> Proposal:
        """Propose what is worth its time behind `tokens`; see `Drafter`."""
        texts = self._continuations(tokens) if self._strategy.copies else []
        masks = self._masks if self._stats.may_draft("masks") else 0
        # what is found is held against what comes even where it does not become a candidate
        plain = Proposal(AR_BLOCK, (), texts=texts)
        if self._stats.is_plain_due or (not masks and not (texts and self._stats.may_draft("copies"))):
            return plain
        predictions: Sequence[Sequence[tuple[int, float]]] = []
        if masks and rows is not None and group:
            predictions = rows.likely(group, tokens, self._strategy.width)
        return self._planned(tokens, masks, predictions, texts)

    def observe(self, step: Verified) -> None:
        """Learn from a step."""
        self._stats.add(step)

    def _continuations(self, tokens: Sequence[int]) -> list[Continuation]:
        self._context.extend(tokens)
        found = self._context.lookup(tokens)
        for source in self._sources:
            found += source.lookup(tokens)
        found.sort(key=lambda each: -each.match)
        # twice as far each time it holds: most of what a large block costs is lost where a match was chance
        return [Continuation(match, text[: 2 * match]) for match, text in found]

    def _planned(
        self,
        tokens: Sequence[int],
        masks: int,
        predictions: Sequence[Sequence[tuple[int, float]]],
        texts: Sequence[Continuation],
    ) -> Proposal:
        now = self._stats.snapshot
        usable = texts if self._stats.may_draft("copies") else ()
        tree = TokenTree(self._corrected(predictions, now), usable, now.copy_probability)
        # a node whose gain is below the cheapest slot's cost may only fill a slot that is free
        tree.grow(max(_MIN_PROBABILITY, now.cheapest), MOST_SLOTS - 1)
        count, masks, anchors = placed(tree.nodes, now.values[:masks], now.prices)
        # the slots up to the next size are free
        slots = 1 + count + masks * len(anchors)
        room = count + next(size for size in SIZES if size >= slots) - slots
        tree.grow(0.0, room)
        nodes = tree.nodes[:room] + [Node(tokens[-1], 0, 1, 0.0)] * (room - len(tree.nodes))
        return Proposal(
            _block(tuple(node.parent for node in nodes), masks, anchors),
            [node.token for node in nodes],
            predictions,
            texts,
        )

    def _corrected(
        self, predictions: Sequence[Sequence[tuple[int, float]]], now: Snapshot
    ) -> Sequence[Sequence[tuple[int, float]]]:
        if not self._strategy.calibrated:
            return predictions
        return [
            [(token, min(MAX_PROBABILITY, share * factor)) for token, share in row]
            for row, factor in zip(predictions, now.calibration, strict=False)
        ]


@lru_cache(maxsize=4096)
def _block(parents: tuple[int, ...], masks: int, anchors: tuple[int, ...]) -> Block:
    """Return a block; the same shapes come again and again, and their tables with them."""
    return Block(parents, masks, anchors) if parents or anchors else AR_BLOCK

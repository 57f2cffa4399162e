"""The token tree of a step: what masks predict and what texts continue with, the most probable first.

Source: token trees as in Medusa (arXiv 2401.10774), section 2.1.2.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import NamedTuple

from space_cli.core.drafting.ngrams import Continuation


class Node(NamedTuple):
    """A candidate.

    Attributes:
        parent: slot of its parent.
        depth: tokens from the head.
        probability: that it and all above it are accepted.
    """

    token: int
    parent: int
    depth: int
    probability: float


class TokenTree:
    """Candidates in order of their probability, each behind its parent.

    Args:
        predictions: by depth, tokens that a mask predicts with their probabilities.
        continuations: texts to copy, the longest match first.
        copied: gives the probability of a copied token by the length of the match in front of it and its rank among
            the texts that go along with its parent.

    Attributes:
        nodes: so far; node i stands in slot i + 1.
    """

    def __init__(
        self,
        predictions: Sequence[Sequence[tuple[int, float]]],
        continuations: Sequence[Continuation],
        copied: Callable[[int, int], float],
    ) -> None:
        self.nodes: list[Node] = []
        self._predictions, self._copied = predictions, copied
        # probability, order, node, and the texts that have gone along with it
        self._order = count()
        self._queue: list[tuple[float, int, Node, Sequence[Continuation]]] = []
        self._add_children(0, 0, 1.0, continuations)

    def grow(self, least: float, most: int) -> None:
        """Add nodes down to the probability `least`, up to `most` in all."""
        queue, nodes = self._queue, self.nodes
        while queue and len(nodes) < most and -queue[0][0] >= least:
            _, _, node, texts = heapq.heappop(queue)
            nodes.append(node)
            self._add_children(len(nodes), node.depth, node.probability, texts)

    def _add_children(self, slot: int, depth: int, probability: float, texts: Sequence[Continuation]) -> None:
        children = dict(self._predictions[depth]) if depth < len(self._predictions) else {}
        along: dict[int, list[Continuation]] = {}
        for text in texts:
            if depth < len(text.tokens):
                along.setdefault(text.tokens[depth], []).append(text)
        for rank, (token, those) in enumerate(along.items()):
            # a copied token that was right makes the match longer by one
            children[token] = max(children.get(token, 0.0), self._copied(those[0].match + depth, rank))
        for token, conditional in children.items():
            node = Node(token, slot, depth + 1, probability * conditional)
            heapq.heappush(self._queue, (-node.probability, next(self._order), node, along.get(token, ())))


def placed(nodes: Sequence[Node], values: Sequence[float], prices: Sequence[float]) -> tuple[int, int, tuple[int, ...]]:
    """Choose the block that brings most tokens beyond those which its time would bring anyway.

    Args:
        nodes: candidates, the most probable first.
        values: by depth, the tokens that a mask brings to the next step behind the last accepted slot.
        prices: of a block by its slots, in tokens.

    Returns:
        How many of the nodes to take, m, and the slots to put mask groups behind.
    """
    gains = [1.0]
    for node in nodes:
        gains.append(gains[-1] + node.probability)
    kept = max(range(len(gains)), key=lambda taken: gains[taken] - prices[1 + taken])
    best, masks, groups = gains[kept] - prices[1 + kept], 0, 0
    # probability that a slot is the last one accepted
    last = [1.0] + [node.probability for node in nodes[:kept]]
    for node in nodes[:kept]:
        last[node.parent] -= node.probability
    order = sorted(range(kept + 1), key=lambda slot: -last[slot])
    value = 0.0
    for size, added in enumerate(values, start=1):
        value += added
        gain = gains[kept]
        for taken, slot in enumerate(order[: (len(prices) - 2 - kept) // size], start=1):
            gain += last[slot] * value
            surplus = gain - prices[1 + kept + taken * size]
            if surplus > best:
                best, masks, groups = surplus, size, taken
    return kept, masks, tuple(sorted(order[:groups]))

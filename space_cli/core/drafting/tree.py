"""The token tree of a step: what masks guess and what texts go on with, and how much of it a block is worth.

Source: token trees as in Medusa (arXiv 2401.10774), section 2.1.2.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import accumulate, count
from typing import NamedTuple

from space_cli.core.drafting.guesses import Guesses
from space_cli.core.drafting.ngrams import Continuation


class Node(NamedTuple):
    """The head or a candidate: its parent's slot, and the probability that it and all above it are accepted."""

    token: int
    parent: int = 0
    depth: int = 0
    probability: float = 1.0


class TokenTree:
    """The head, then candidates in order of their probability, each behind its parent: node i is to stand in slot i.

    Args:
        head: the newest token.
        guesses: of the masks; None without any.
        texts: to copy, the longest match first.
        copy_probability: of a text's token, by its depth and its rank among the texts that have gone along so far.
        allows: whether the tokens from the head on to a node may come; None where all may.
    """

    def __init__(
        self,
        head: int,
        guesses: Guesses | None,
        texts: Sequence[Continuation],
        copy_probability: Callable[[Continuation, int, int], float],
        allows: Callable[[list[int]], bool] | None = None,
    ) -> None:
        self.nodes: list[Node] = []
        self._guesses, self._copy_probability, self._allows = guesses, copy_probability, allows
        self._queue: list[tuple[float, int, Node, Sequence[Continuation]]] = []
        self._order = count()
        self._add(Node(head), texts)

    def grow(self, least: float, most: int) -> None:
        """Add nodes down to the probability `least`, up to `most` in all."""
        while self._queue and len(self.nodes) < most and -self._queue[0][0] >= least:
            self._add(*heapq.heappop(self._queue)[2:])

    def _add(self, node: Node, texts: Sequence[Continuation]) -> None:
        """Add a node, up to which `texts` have gone along, and queue its children."""
        slot, depth = len(self.nodes), node.depth
        self.nodes.append(node)
        children: dict[int, float] = {}
        if self._guesses is not None and depth < len(self._guesses):
            children |= self._guesses.after(depth, node.token)
        along: dict[int, list[Continuation]] = {}
        for text in texts:
            if depth < len(text.tokens):
                along.setdefault(text.tokens[depth], []).append(text)
        for rank, (token, those) in enumerate(along.items()):
            children[token] = max(children.get(token, 0.0), self._copy_probability(those[0], depth, rank))
        path = [] if self._allows is None else self._path(slot)
        for token, conditional in children.items():
            if self._allows is None or self._allows([*path, token]):
                child = Node(token, slot, depth + 1, node.probability * conditional)
                heapq.heappush(self._queue, (-child.probability, next(self._order), child, along.get(token, ())))

    def _path(self, slot: int) -> list[int]:
        """Return the tokens behind the head, on to a slot."""
        path: list[int] = []
        while slot:
            path.insert(0, self.nodes[slot].token)
            slot = self.nodes[slot].parent
        return path


def most_worth(
    nodes: Sequence[Node], values: Sequence[float], prices: Sequence[float], mask_factor: float
) -> tuple[int, int, list[int]]:
    """Return how many nodes, m and mask groups behind which slots bring most tokens beyond the price of their slots.

    Args:
        nodes: the head first, then the most probable.
        values: by depth, the tokens that a mask brings to the next step behind the last accepted slot.
        prices: by slots, in tokens.
        mask_factor: how many times as much slots cost if some are masks.
    """
    gains = [0.0, *accumulate(node.probability for node in nodes)]
    taken = max(range(1, len(gains)), key=lambda many: gains[many] - prices[many])
    best, masks, groups = gains[taken] - prices[taken], 0, 0
    # probability that a slot is the last one accepted
    last = [node.probability for node in nodes[:taken]]
    for node in nodes[1:taken]:
        last[node.parent] -= node.probability
    order = sorted(range(taken), key=lambda slot: -last[slot])
    for size, value in enumerate(accumulate(values), start=1):
        gain = gains[taken]
        for many, slot in enumerate(order[: (len(prices) - 1 - taken) // size], start=1):
            gain += last[slot] * value
            worth = gain - prices[taken + many * size] * mask_factor
            if worth > best:
                best, masks, groups = worth, size, many
    return taken, masks, sorted(order[:groups])

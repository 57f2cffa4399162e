"""The token tree of a step: what masks guess and what texts go on with, and how much of it a block is worth.

Source: token trees as in Medusa (arXiv 2401.10774), section 2.1.2.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import NamedTuple

from space_cli.core.drafting.guesses import Guesses
from space_cli.core.drafting.ngrams import Continuation


class Node(NamedTuple):
    """A candidate behind the slot `parent`, with the probability that it and all above it are accepted."""

    token: int
    parent: int
    depth: int
    probability: float


class TokenTree:
    """Candidates in order of their probability, each behind its parent: node i is to stand in slot i + 1.

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
        self._head, self._guesses, self._copy_probability, self._allows = head, guesses, copy_probability, allows
        self._queue: list[tuple[float, int, Node, Sequence[Continuation]]] = []
        self._order = count()
        self._add_children(0, 0, 1.0, texts)

    def grow(self, least: float, most: int) -> None:
        """Add nodes down to the probability `least`, up to `most` in all."""
        while self._queue and len(self.nodes) < most and -self._queue[0][0] >= least:
            *_, node, texts = heapq.heappop(self._queue)
            self.nodes.append(node)
            self._add_children(len(self.nodes), node.depth, node.probability, texts)

    def _add_children(self, slot: int, depth: int, probability: float, texts: Sequence[Continuation]) -> None:
        children: dict[int, float] = {}
        if self._guesses is not None and depth < len(self._guesses):
            children |= self._guesses.after(depth, self.nodes[slot - 1].token if slot else self._head)
        along: dict[int, list[Continuation]] = {}
        for text in texts:
            if depth < len(text.tokens):
                along.setdefault(text.tokens[depth], []).append(text)
        for rank, (token, those) in enumerate(along.items()):
            children[token] = max(children.get(token, 0.0), self._copy_probability(those[0], depth, rank))
        if self._allows is not None:
            path = self._path(slot)
            children = {token: conditional for token, conditional in children.items() if self._allows([*path, token])}
        for token, conditional in children.items():
            node = Node(token, slot, depth + 1, probability * conditional)
            heapq.heappush(self._queue, (-node.probability, next(self._order), node, along.get(token, ())))

    def _path(self, slot: int) -> list[int]:
        """Return the tokens from the head on to a slot."""
        path: list[int] = []
        while slot:
            node = self.nodes[slot - 1]
            path.insert(0, node.token)
            slot = node.parent
        return path


def most_worth(
    nodes: Sequence[Node], values: Sequence[float], prices: Sequence[float], mask_factor: float = 1.0
) -> tuple[int, int, list[int]]:
    """Return how many nodes, m and mask groups behind which slots bring most tokens beyond the price of their slots.

    Args:
        nodes: the most probable first.
        values: by depth, the tokens that a mask brings to the next step behind the last accepted slot.
        prices: by slots, in tokens.
        mask_factor: how many times as much slots cost if some are masks.
    """
    gains = [1.0]
    for node in nodes:
        gains.append(gains[-1] + node.probability)
    taken = max(range(len(gains)), key=lambda many: gains[many] - prices[1 + many])
    best, masks, groups = gains[taken] - prices[1 + taken], 0, 0
    # probability that a slot is the last one accepted
    last = [1.0] + [node.probability for node in nodes[:taken]]
    for node in nodes[:taken]:
        last[node.parent] -= node.probability
    order = sorted(range(taken + 1), key=lambda slot: -last[slot])
    value = 0.0
    for size, added in enumerate(values, start=1):
        value += added
        gain = gains[taken]
        for many, slot in enumerate(order[: (len(prices) - 2 - taken) // size], start=1):
            gain += last[slot] * value
            price = prices[1 + taken + many * size] * mask_factor
            if gain - price > best:
                best, masks, groups = gain - price, size, many
    return taken, masks, sorted(order[:groups])

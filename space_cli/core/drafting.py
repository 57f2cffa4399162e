"""What a step proposes: the block, and the candidates in it.

`ChainDrafts` is the paper's: always the same block, a mask group behind every token slot, one guess per position.
`AdaptiveDrafts` draws every block anew from what is likely and what a slot costs. Candidates come from two sources: the
most likely tokens of each mask (a tree), and the continuation of the newest n-gram where the context already has one
(a chain that runs along the tree). A candidate, or a mask group behind it, gets a slot while the tokens it can be
expected to bring are worth more than the time it takes, at the rate at which tokens come now; where nothing is, the
step is plain AR. Nothing here can change a token of the output: every candidate is verified.

Sources: SPACE paper (arXiv 2402.11809), section 3.3; token trees as in Medusa (arXiv 2401.10774), section 2.1.2;
candidates copied from the context as in LLMA (arXiv 2304.04487) and prompt lookup decoding.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise, takewhile
from typing import Literal, NamedTuple, Protocol

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.choose import Rows
from space_cli.core.costs import MOST_SLOTS, SIZES, StepCosts, filled_up
from space_cli.core.stream import in_common

Drafter = Callable[[Sequence[int], Sequence[int]], Sequence[int]]
"""Replaces drafts: gets all tokens so far (prompt included) and the candidate of each slot, returns those to use."""

# likeliest tokens of a mask that become candidates, and that count as a right guess when a group's worth is learned
_WIDTH, _COUNTED = 4, 2
_LOOKUP_TOKENS, _LONGEST_MATCH = MOST_SLOTS - 1, 4
# what is known before the first step: a mask's guess holds in a third of cases, a copied token by how many tokens in
# front of it were the same too
_FIRST_VALUE, _FIRST_MATCH = 0.35, {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.7, 6: 0.8, 10: 0.9, 16: 0.98}
_FIRST_TOKENS = 1.2
_DECAY, _PRIOR_WEIGHT = 0.97, 4.0
_MOST_LIKELY, _LEAST_CHANCE = 0.995, 0.01
_FRESH = 8
"""Steps between two looks at experience: it costs as much as the rest of planning."""
_LONGEST_HICCUP = 3.0
# steps by the way that is faster, twice as many each time it wins, and steps by the other between them
_FIRST_STRETCH, _LONGEST_STRETCH, _TRIAL = 16, 256, 8
# what a trial must gain to be believed: steps of the same kind differ by as much
_CLEARLY = 1.05


@dataclass(frozen=True)
class Proposal:
    """A block and the token in each of its candidate slots."""

    block: Block
    candidates: Sequence[int]


class Drafts(Protocol):
    """Proposes what the next model call verifies; lives as long as one generation."""

    max_slots: int

    def first(self, tokens: Sequence[int]) -> Proposal:
        """Propose for the first step, when no mask has guessed yet; the last of `tokens` is the head."""

    def following(
        self, rows: Rows, done: Proposal, path: Sequence[int], tokens: Sequence[int], seconds: float
    ) -> Proposal:
        """Propose for the step after one whose rows these are.

        Args:
            rows: of the step that is done.
            done: what it verified.
            path: the slots passed, head first.
            tokens: all so far, the last of which is the new head.
            seconds: that the step took.
        """


_REST = Proposal(AR_BLOCK, ())
_SHORTEST_CHAIN = Block.chain(1, 1)


class ChainDrafts:
    """One block for all steps; each mask group gives one guess per position.

    Args:
        block: of every step.
        drafter: puts other candidates in place of the guesses.
    """

    def __init__(self, block: Block, drafter: Drafter | None = None) -> None:
        self.max_slots = block.num_slots
        self._block, self._drafter = block, drafter

    def first(self, tokens: Sequence[int]) -> Proposal:
        """Propose without guesses."""
        return self._proposal(tokens, [])

    def following(
        self, rows: Rows, done: Proposal, path: Sequence[int], tokens: Sequence[int], seconds: float
    ) -> Proposal:
        """Propose what the mask group behind the last accepted slot guesses to follow `tokens`."""
        history = list(tokens)
        for row in done.block.group(path[-1]):
            history.append(rows.token(row, history))
        return self._proposal(tokens, history[len(tokens) :])

    def _proposal(self, tokens: Sequence[int], guesses: Sequence[int]) -> Proposal:
        """Put guesses into slots by depth; a slot without one holds a token like any other."""
        depths = self._block.offsets[1 : self._block.num_tokens]
        candidates = [guesses[depth - 1] if depth <= len(guesses) else tokens[-1] for depth in depths]
        return Proposal(self._block, candidates if self._drafter is None else list(self._drafter(tokens, candidates)))


class _Average:
    """How often something held, of late."""

    def __init__(self, prior: float, weight: float = _PRIOR_WEIGHT) -> None:
        self._prior, self._weight = prior, weight
        self._hits = self._chances = 0.0

    def add(self, hits: float, chances: float = 1.0) -> None:
        self._hits = self._hits * _DECAY + hits
        self._chances = self._chances * _DECAY + chances

    def forget(self) -> None:
        self._hits *= _DECAY
        self._chances *= _DECAY

    def towards(self, prior: float) -> float:
        return (self._hits + prior * self._weight) / (self._chances + self._weight)

    @property
    def value(self) -> float:
        return self.towards(self._prior)


Way = Literal["planned", "chain", "copies", "none"]
"""How a step is drafted. planned: a block drawn by what masks and copies promise. chain: one mask's guess, unplanned;
where a step takes half a millisecond, planning is a sixth of it. copies: planned, from the context alone. none: plain
AR. A long match in the context is copied whatever the way."""


class _Contest:
    """Ways to draft, of which the one that has been fastest of late gets most of the steps.

    What a step costs is measured here, where it is taken: figures from before a run may be those of a busier machine.

    Attributes:
        way: in which steps are now taken.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self.way = self._best = ways[0]
        self._ways = ways
        self._tokens, self._seconds = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
        self._stretch = self._left = _FIRST_STRETCH
        self._begun, self._trials = False, 0

    def took(self, tokens: int, seconds: float) -> None:
        """Take in a step, and find out how the next one is to be taken."""
        # the first step of a stretch has yet to find its way: no guesses, a block of another size
        if self._begun:
            self._tokens[self.way] = self._tokens[self.way] * _DECAY + tokens
            self._seconds[self.way] = self._seconds[self.way] * _DECAY + seconds
        self._begun = True
        self._left -= 1
        if not self._left:
            self._turn()

    def _turn(self) -> None:
        """Try another way behind a stretch of the best; go on with the better of the two behind a trial."""
        others = [way for way in self._ways if way != self._best]
        if self.way == self._best:
            self.way, self._left = others[self._trials % len(others)], _TRIAL
            self._trials += 1
            # earlier trials were of another text
            self._tokens[self.way] /= 2
            self._seconds[self.way] /= 2
        else:
            # tokens over seconds, crosswise
            best = self._tokens[self._best] * self._seconds[self.way]
            if self._tokens[self.way] * self._seconds[self._best] > _CLEARLY * best:
                self._best, self._stretch, self._trials = self.way, _FIRST_STRETCH, 0
            elif self._trials % len(others) == 0:
                self._stretch = min(2 * self._stretch, _LONGEST_STRETCH)
            self.way, self._left = self._best, self._stretch
        self._begun = False


class Experience:
    """How often guesses of a model have been right of late; may serve one generation after another.

    Args:
        masks: m, the longest mask group.
        accepted: how often 1, 2, ... guesses of a group were accepted before; a figure of ours where it is not known.

    Attributes:
        calibration: by depth, right guesses over those expected from the masks' own probabilities.
        values: by depth, how often a mask group brought an accepted token there that a copy would not have brought.
        matches: how often a copied token was right, by the length of the match in front of it.
        pace: seconds of a step over those measured beforehand; paces are the same by number of slots.
        contest: between ways to draft.
        yields: tokens over the time of a plain step, of late.
    """

    def __init__(self, masks: int, accepted: Sequence[float] = ()) -> None:
        self.calibration = [_Average(1.0) for _ in range(masks)]
        values = [*accepted, *(_FIRST_VALUE**depth for depth in range(len(accepted) + 1, masks + 1))]
        self.values = [_Average(value) for value in values[:masks]]
        self.matches = {length: _Average(prior) for length, prior in _FIRST_MATCH.items()}
        self.contest = _Contest(("planned", "chain", "copies", "none") if masks else ("planned", "none"))
        self.yields = _Average(_FIRST_TOKENS)
        self.pace = _Average(1.0)
        self.paces = {size: _Average(1.0) for size in SIZES}


@dataclass(slots=True)
class _Node:
    """A candidate under consideration.

    Attributes:
        parent: slot of its parent.
        share: chance that it is right if its parent is.
        chance: that it is right, and all above it.
        match: length of the match that it continues, as in `_FIRST_MATCH`; 0 where a mask guessed it.
    """

    token: int
    parent: int
    depth: int
    share: float
    chance: float
    match: int


class _Beliefs(NamedTuple):
    """What experience says at some step; it changes little from one to the next.

    Attributes:
        factors: by depth, of the masks' own probabilities.
        held: chance of a copied token by the length of the match in front of it.
        values: by depth, of a mask.
        seconds: of a step by its slots, up to `MOST_SLOTS`.
    """

    factors: list[float]
    held: dict[int, float]
    values: list[float]
    seconds: list[float]


class _Tree:
    """Candidates, the likeliest first, each behind its parent.

    Args:
        shares: by depth, tokens that the masks guess with their chances.
        copied: what followed the match.
        match: its length.
        held: chance of a copied token by the length of the match in front of it.
    """

    def __init__(
        self,
        shares: Sequence[Sequence[tuple[int, float]]],
        copied: Sequence[int],
        match: int,
        held: Mapping[int, float],
    ) -> None:
        self.nodes: list[_Node] = []
        self._shares, self._copied, self._match, self._held = shares, copied, match, held
        self._queue: list[tuple[float, int, _Node, bool]] = []
        self._serial = 0
        self._add_children(0, 0, 1.0, on_copy=bool(copied))

    def grow(self, least: float, most: int) -> None:
        """Add nodes down to the chance `least`, up to `most` in all."""
        while self._queue and len(self.nodes) < most and -self._queue[0][0] >= least:
            _, _, node, on_copy = heapq.heappop(self._queue)
            self.nodes.append(node)
            self._add_children(len(self.nodes), node.depth, node.chance, on_copy=on_copy)

    def _add_children(self, slot: int, depth: int, chance: float, *, on_copy: bool) -> None:
        below: dict[int, tuple[float, int]] = {}
        if depth < len(self._shares):
            below = {token: (share, 0) for token, share in self._shares[depth]}
        copy = self._copied[depth] if on_copy and depth < len(self._copied) else None
        if copy is not None:
            length = max(length for length in self._held if length <= self._match + depth)
            if self._held[length] >= below.get(copy, (0.0, 0))[0]:
                below[copy] = (self._held[length], length)
        for token, (share, known) in below.items():
            node = _Node(token, slot, depth + 1, share, chance * share, known)
            heapq.heappush(self._queue, (-node.chance, self._serial, node, token == copy))
            self._serial += 1


@dataclass
class AdaptiveDrafts:
    """Blocks drawn by expected gain; what has been accepted so far and what a call costs decide.

    Other ways to draft are held against it all the time, and get the steps where they are faster: see `Way`.

    Args:
        costs: of a model call.
        masks: m, the longest mask group; 0 drafts from the context alone.
        lookup: whether candidates may be copied from the context.
        experience: of generations before, which this one goes on from and adds to; None begins anew.

    Attributes:
        guessed: the likeliest token of each mask behind the last accepted slot; empty where it had no group.
    """

    costs: StepCosts
    masks: int
    lookup: bool = True
    experience: Experience | None = None
    max_slots: int = MOST_SLOTS
    guessed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._context = _Context()
        self._known = self.experience or Experience(self.masks)
        self._nodes: list[_Node] = []
        self._copied: list[int] = []
        self._spent, self._planned = 0.0, 0
        self._way: Way = "planned"
        self._forced = False
        self._guesses: list[set[int]] = []

    @property
    def way(self) -> Way:
        """How the next step is to be drafted, but for long matches."""
        return self._known.contest.way

    def first(self, tokens: Sequence[int]) -> Proposal:
        """Propose from the prompt alone."""
        return self._proposal(None, range(0), tokens)

    def following(
        self, rows: Rows, done: Proposal, path: Sequence[int], tokens: Sequence[int], seconds: float
    ) -> Proposal:
        """Propose from the mask group behind the last accepted slot, where it had one, and from the context."""
        if self._way in ("planned", "copies"):
            self._learn(done, path, tokens)
        self._time(done.block.num_slots, len(path), seconds + self._spent)
        return self._proposal(rows, done.block.group(path[-1]), tokens)

    def _learn(self, done: Proposal, path: Sequence[int], tokens: Sequence[int]) -> None:
        """Compare what was expected of the step with what came."""
        accepted = len(path) - 1
        followed = dict(pairwise(path))
        # chances of children under each slot that was reached
        for slot in path:
            children = [self._nodes[child - 1] for child in done.block.children[slot]]
            right = followed.get(slot)
            guessed = [node for node in children if not node.match]
            if guessed and guessed[0].depth <= self.masks:
                hit = right is not None and not self._nodes[right - 1].match
                self._known.calibration[guessed[0].depth - 1].add(hit, sum(node.share for node in guessed))
            for node in children:
                if node.match:
                    token = tokens[len(tokens) - 2 - accepted + node.depth]
                    self._known.matches[node.match].add(node.token == token)
        came = tokens[len(tokens) - 1 - accepted :]
        copied = in_common(self._copied, came)
        hits = sum(1 for _ in takewhile(lambda pair: pair[1] in pair[0], zip(self._guesses, came, strict=False)))
        for depth, value in enumerate(self._known.values, start=1):
            if not self._guesses:
                if self._way == "planned":
                    value.forget()
            elif depth <= len(came) or hits < len(came):
                # what a copied token would have brought too is not the masks' merit
                value.add(max(0, (hits >= depth) - (copied >= depth)))

    def _time(self, slots: int, tokens: int, seconds: float) -> None:
        """Take in what a step really cost: in an answer calls of a size can be faster or slower than when measured."""
        # a hiccup of the machine is no property of a block
        seconds = min(seconds, _LONGEST_HICCUP * self._seconds(slots))
        for pace in (self._known.pace, self._known.paces[slots]):
            pace.add(seconds / self.costs.by_slots[slots])
        self._known.yields.add(tokens, seconds / self.costs.by_slots[1])
        if not self._forced:
            self._known.contest.took(tokens, seconds)

    def _seconds(self, slots: int) -> float:
        """Return the seconds to expect of a step of such a size."""
        return self.costs.by_slots[slots] * self._known.paces[slots].towards(self._known.pace.value)

    def _proposal(self, rows: Rows | None, group: range, tokens: Sequence[int]) -> Proposal:
        began = time.perf_counter()
        copied, match = self._context.continuation(tokens) if self.lookup else ([], 0)
        # twice as far each time it holds: most of what a large block costs is lost where a match was chance
        self._copied = copied[: 2 * match]
        # a long match is copied in all ways, and says nothing of any of them
        self._forced = match >= _LONGEST_MATCH
        self._way = "planned" if self._forced else self.way
        self.guessed = []
        if self._way == "none":
            proposal = _REST
        elif self._way == "chain":
            guess = rows.token(group[0], tokens) if rows is not None and group else tokens[-1]
            proposal = Proposal(_SHORTEST_CHAIN, [guess])
        else:
            likely = rows.likely(group, tokens, _WIDTH) if rows is not None and group else []
            proposal = self._planned_proposal(tokens, likely if self._way == "planned" else [], match)
        self._spent = time.perf_counter() - began
        return proposal

    def _planned_proposal(
        self, tokens: Sequence[int], guesses: Sequence[Sequence[tuple[int, float]]], match: int
    ) -> Proposal:
        self._guesses = [{token for token, _ in row[:_COUNTED]} for row in guesses]
        self.guessed = [row[0][0] for row in guesses]
        if self._planned % _FRESH == 0:
            self._beliefs = self._believed()
        self._planned += 1
        # tokens per second at which a step is worth its time
        rate, seconds = self._known.yields.value / self.costs.by_slots[1], self._beliefs.seconds
        tree = self._tree(guesses, match)
        # what brings less than the cheapest slot costs is at most worth a slot that costs nothing
        tree.grow(max(_LEAST_CHANCE, rate * _cheapest(seconds)), MOST_SLOTS - 1)
        count, masks, anchors = self._worth(tree.nodes, rate, seconds)
        # the slots up to the next size cost nothing
        room = _size_of(1 + count + masks * len(anchors)) - masks * len(anchors) - 1
        tree.grow(0.0, room)
        idle = [_Node(tokens[-1], 0, 1, 0.0, 0.0, 0)] * (room - len(tree.nodes))
        self._nodes = tree.nodes[:room] + idle
        parents = tuple(node.parent for node in self._nodes)
        return Proposal(_block(parents, masks, anchors), [node.token for node in self._nodes])

    def _believed(self) -> _Beliefs:
        return _Beliefs(
            factors=[average.value for average in self._known.calibration],
            held={length: min(_MOST_LIKELY, average.value) for length, average in self._known.matches.items()},
            values=[average.value for average in self._known.values],
            seconds=filled_up({size: self._seconds(size) for size in SIZES}),
        )

    def _tree(self, guesses: Sequence[Sequence[tuple[int, float]]], match: int) -> _Tree:
        shares = [
            [(token, min(_MOST_LIKELY, share * factor)) for token, share in row]
            for row, factor in zip(guesses, self._beliefs.factors, strict=False)
        ]
        # a copied token that was right makes the match longer by one
        return _Tree(shares, self._copied, match, self._beliefs.held)

    def _worth(self, nodes: Sequence[_Node], rate: float, seconds: Sequence[float]) -> tuple[int, int, tuple[int, ...]]:
        """Return how many of the nodes to take, m, and behind which slots to put mask groups.

        The best is what brings most tokens beyond those that its time, by `seconds`, would bring at the `rate` of late.
        """
        gains = list(accumulate((node.chance for node in nodes), initial=1.0))
        count = max(range(len(gains)), key=lambda taken: gains[taken] - rate * seconds[1 + taken])
        best, masks, groups = gains[count] - rate * seconds[1 + count], 0, 0
        # chance that a slot is the last one accepted
        last = [1.0] + [node.chance for node in nodes[:count]]
        for node in nodes[:count]:
            last[node.parent] -= node.chance
        order = sorted(range(count + 1), key=lambda slot: -last[slot])
        worth_of_group = 0.0
        for size, value in enumerate(self._beliefs.values if self._way == "planned" else (), start=1):
            worth_of_group += value
            reached = gains[count]
            for taken, slot in enumerate(order[: (MOST_SLOTS - 1 - count) // size], start=1):
                reached += last[slot] * worth_of_group
                surplus = reached - rate * seconds[1 + count + taken * size]
                if surplus > best:
                    best, masks, groups = surplus, size, taken
        return count, masks, tuple(sorted(order[:groups]))


class _Context:
    """Where n-grams of the text so far stood last."""

    def __init__(self) -> None:
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(_LONGEST_MATCH)]
        self._seen = 0

    def continuation(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Return the tokens that followed the longest match of the newest ones, and its length."""
        for end in range(max(1, self._seen), len(tokens)):
            for length, ends in enumerate(self._ends, start=1):
                if end >= length:
                    ends[tuple(tokens[end - length : end])] = end
        self._seen = len(tokens)
        for length in range(min(_LONGEST_MATCH, len(tokens)), 0, -1):
            found = self._ends[length - 1].get(tuple(tokens[-length:]))
            if found is not None:
                while length < min(found, max(_FIRST_MATCH)) and tokens[found - length - 1] == tokens[-length - 1]:
                    length += 1
                return self._copied_from(tokens, found), length
        return [], 0

    def _copied_from(self, tokens: Sequence[int], end: int) -> list[int]:
        """Return what follows `end`; a text that runs into its own end goes on as it did, as loops do."""
        copied = list(tokens[end : end + _LOOKUP_TOKENS])
        return copied if len(copied) == _LOOKUP_TOKENS else (copied * _LOOKUP_TOKENS)[:_LOOKUP_TOKENS]


def _cheapest(seconds: Sequence[float]) -> float:
    """Return the least that a slot more costs, from one size of block to a larger one."""
    return min((seconds[larger] - seconds[size]) / (larger - size) for size, larger in pairwise(SIZES))


def _size_of(slots: int) -> int:
    """Return Q of the block that is run for so many slots."""
    return next(size for size in SIZES if size >= slots)


@lru_cache(maxsize=4096)
def _block(parents: tuple[int, ...], masks: int, anchors: tuple[int, ...]) -> Block:
    """Return a block; the same shapes come again and again, and their tables with them."""
    return Block(parents, masks, anchors) if parents or anchors else AR_BLOCK

"""What was accepted, and what steps cost: running averages, from one generation to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Literal, NamedTuple

from space_cli.core.costs import SIZES, StepCosts, filled_up
from space_cli.core.drafting.chain import Proposal, Verified
from space_cli.core.drafting.ngrams import LONGEST_MATCH, Continuation
from space_cli.core.stream import in_common

SourceName = Literal["masks", "copies"]

# what is assumed before the first step: a mask's prediction is accepted in a third of cases, a copied token by how many
# tokens in front of it were the same too, and of another match half as often
_FIRST_ACCEPTED, _FIRST_TOKENS = 0.35, 1.2
_FIRST_COPIED = {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.7, 6: 0.8, 10: 0.9, 16: 0.98}
_FIRST_OTHER = 0.3
_DECAY, _PRIOR_WEIGHT = 0.97, 4.0
MAX_PROBABILITY = 0.995
_COUNTED = 2
"""Likeliest tokens of a mask of which one must be right for the mask to have been worth its slot."""
_REFRESH = 8
"""Steps between two snapshots: taking one costs as much as the rest of planning."""
_LONGEST_HICCUP = 3.0
# plain steps are timed anew after so many others: what drafts gain is held against them
_MAX_WITHOUT_PLAIN = 64
# in plain steps: what a source of drafts may lose before it rests, at first and when it has gained
_FIRST_CREDIT, _MAX_CREDIT = 8.0, 32.0


class Ema:
    """How often something held, of late: an average that starts from a prior and decays with each observation."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._hits = self._total = 0.0

    def add(self, hits: float, total: float = 1.0) -> None:
        """Take in that `hits` of `total` held."""
        self._hits = self._hits * _DECAY + hits
        self._total = self._total * _DECAY + total

    def forget(self) -> None:
        """Go some way back to the prior."""
        self._hits *= _DECAY
        self._total *= _DECAY

    def towards(self, prior: float) -> float:
        """Return the average, starting from another prior."""
        return (self._hits + prior * _PRIOR_WEIGHT) / (self._total + _PRIOR_WEIGHT)

    @property
    def value(self) -> float:
        """The average."""
        return self.towards(self._prior)


class Snapshot(NamedTuple):
    """What the averages say; it changes little from one step to the next.

    Attributes:
        calibration: by depth, accepted predictions over those expected from the masks' own probabilities.
        values: by depth, the tokens that a mask brings.
        copied: by rank and length of the match, probability of a copied token.
        prices: of a step by its slots: the tokens that its time brings at the rate of late.
        cheapest: the least that another slot costs, in tokens.
    """

    calibration: Sequence[float]
    values: Sequence[float]
    copied: Sequence[Sequence[float]]
    prices: Sequence[float]
    cheapest: float

    def copy_probability(self, match: int, rank: int) -> float:
        """Return the probability of a copied token behind a match of such a length; rank 0 is the longest match's."""
        known = self.copied[min(rank, 1)]
        return known[min(match, len(known)) - 1]


class AcceptanceStats:
    """What was accepted of late, what steps took, and what drafts may still lose; serves one generation after another.

    Args:
        costs: of steps, measured beforehand; what they are found to be later is held against these.
        masks: m, the longest mask group.
        accepted: how often 1, 2, ... predictions of a group were accepted before; assumed where it is not known.
        trials: the share of time that drafts may lose against plain decoding.
    """

    def __init__(self, costs: StepCosts, masks: int, accepted: Sequence[float] = (), *, trials: float = 0.01) -> None:
        self._seconds, self._trials = costs.by_slots, trials
        values = [*accepted, *(_FIRST_ACCEPTED**depth for depth in range(len(accepted) + 1, masks + 1))]
        self._values = [Ema(value) for value in values[:masks]]
        self._calibration = [Ema(1.0) for _ in range(masks)]
        self._copied = {
            (length, rank): Ema(prior * _FIRST_OTHER if rank else prior)
            for length, prior in _FIRST_COPIED.items()
            for rank in (0, 1)
        }
        self._tokens_per_plain_step = Ema(_FIRST_TOKENS)
        self._time_ratio = Ema(1.0)
        self._time_ratios = {size: Ema(1.0) for size in SIZES}
        self._credit: dict[SourceName, float] = dict.fromkeys(("masks", "copies"), _FIRST_CREDIT)
        self._steps = self._since_plain = 0
        self.snapshot = self._snapshot()

    def may_draft(self, source: SourceName) -> bool:
        """Return whether a source has not lost more than it may."""
        return self._credit[source] > 0

    @property
    def is_plain_due(self) -> bool:
        """Whether a plain step is to be timed again."""
        return self._since_plain >= _MAX_WITHOUT_PLAIN

    def add(self, step: Verified) -> None:
        """Take in what a proposal brought and what it cost."""
        if step.proposal.texts:
            self._learn_copies(step.proposal.texts, step.tokens)
        self._learn_predictions(step.proposal, step.tokens)
        self._learn_costs(step)
        self._steps += 1
        if self._steps % _REFRESH == 0:
            self.snapshot = self._snapshot()

    def _learn_copies(self, texts: Sequence[Continuation], came: Sequence[int]) -> None:
        """Hold what could be copied against what came, whether it was a candidate or not: that costs no slot."""
        known: set[int] = set()
        for text in texts:
            if text.tokens[0] not in known:
                self._copied[_bucket(text.match), min(len(known), 1)].add(text.tokens[0] == came[0])
                known.add(text.tokens[0])
        # a copied token that was right makes the match longer by one
        for depth in range(1, min(in_common(texts[0].tokens, came) + 1, len(came), len(texts[0].tokens))):
            self._copied[_bucket(texts[0].match + depth), 0].add(texts[0].tokens[depth] == came[depth])

    def _learn_predictions(self, proposal: Proposal, came: Sequence[int]) -> None:
        """Find how often masks are right, and what their group brought beyond what a copy brings too."""
        if not proposal.predictions:
            for value in self._values:
                value.forget()
            return
        for calibration, row, token in zip(self._calibration, proposal.predictions, came, strict=False):
            probabilities = dict(row)
            calibration.add(token in probabilities, sum(probabilities.values()))
            if token not in probabilities:
                break
        top = ([token for token, _ in row[:_COUNTED]] for row in proposal.predictions)
        hits = sum(1 for _ in takewhile(lambda pair: pair[1] in pair[0], zip(top, came, strict=False)))
        copied = in_common(proposal.texts[0].tokens, came) if proposal.texts else 0
        for depth, value in enumerate(self._values, start=1):
            if depth <= len(came) or hits < len(came):
                value.add(max(0, (hits >= depth) - (copied >= depth)))

    def _learn_costs(self, step: Verified) -> None:
        block, tokens = step.proposal.block, len(step.tokens)
        slots = block.num_slots
        # a hiccup of the machine is no property of a block
        seconds = min(step.seconds, _LONGEST_HICCUP * self._expected_seconds(slots))
        for ratio in (self._time_ratio, self._time_ratios[slots]):
            ratio.add(seconds / self._seconds[slots])
        self._tokens_per_plain_step.add(tokens, seconds / self._seconds[1])
        plain = seconds / self._expected_seconds(1)
        for source in self._credit:
            self._credit[source] = min(_MAX_CREDIT, self._credit[source] + self._trials * plain)
        if slots == 1:
            self._since_plain = 0
            return
        self._since_plain += 1
        self._credit[_charged(step.proposal)] += tokens - plain

    def _expected_seconds(self, slots: int) -> float:
        return self._seconds[slots] * self._time_ratios[slots].towards(self._time_ratio.value)

    def _snapshot(self) -> Snapshot:
        seconds = filled_up({size: self._expected_seconds(size) for size in SIZES})
        # tokens per second at which a step is worth its time
        rate = self._tokens_per_plain_step.value / self._seconds[1]
        return Snapshot(
            calibration=[ema.value for ema in self._calibration],
            values=[ema.value for ema in self._values],
            copied=[
                [
                    min(MAX_PROBABILITY, self._copied[_bucket(match), rank].value)
                    for match in range(1, LONGEST_MATCH + 1)
                ]
                for rank in (0, 1)
            ],
            prices=[rate * each for each in seconds],
            cheapest=rate
            * min((seconds[larger] - seconds[size]) / (larger - size) for size, larger in pairwise(SIZES)),
        )


def _bucket(match: int) -> int:
    return max(length for length in _FIRST_COPIED if length <= match)


def _charged(proposal: Proposal) -> SourceName:
    """Return which source answers for a step's time."""
    return "masks" if proposal.block.anchors or proposal.predictions else "copies"

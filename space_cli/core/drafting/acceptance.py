"""What was accepted and what steps cost: running averages, kept from one generation to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from space_cli.core.costs import MAX_BLOCK_SLOTS, SIZES, StepCosts, filled_up
from space_cli.core.drafting.chain import Proposal, Verified
from space_cli.core.drafting.ngrams import LONGEST_MATCH, Continuation
from space_cli.core.stream import common_prefix_length

# assumed before the first step: a mask is right in a third of cases, a copied token by its match of 1, 2, 4, 8, 16
_FIRST_ACCEPTED = 0.35
_FIRST_COPIED = (0.2, 0.4, 0.7, 0.85, 0.95)
_DECAY, _PRIOR_WEIGHT = 0.97, 4.0
_LONGEST_HICCUP = 3.0
_MAX_WITHOUT_PLAIN = 64
"""Steps after which a plain one is timed again: what drafts gain is held against it."""
_CREDIT = 8.0
"""Plain steps that masks may lose before they rest until it has been saved up again."""


class Ema:
    """An average that starts from a prior and decays with each observation."""

    def __init__(self, prior: float) -> None:
        self.value = self._prior = prior
        self._hits = self._total = 0.0

    def add(self, hits: float, total: float = 1.0) -> None:
        """Add `hits` of `total`; 0 of 0 decays towards the prior."""
        self._hits = self._hits * _DECAY + hits
        self._total = self._total * _DECAY + total
        self.value = self.towards(self._prior)

    def towards(self, prior: float) -> float:
        """Return the average, starting from another prior."""
        return (self._hits + prior * _PRIOR_WEIGHT) / (self._total + _PRIOR_WEIGHT)


class AcceptanceStats:
    """What was accepted of late, what steps took, and what masks may still lose.

    Masks have a credit in plain steps, which bounds what trials of them cost: it grows by a fraction of the time that
    passes, and by gains; losses are taken from it. Copies need no trials, see `_add_copies`.

    Args:
        costs: of steps, as measured beforehand.
        masks: m, the longest mask group.
        accepted: how often 1, 2, ... guesses of a group were accepted before; assumed where it is not known.
        trials: the fraction of time that masks may lose.

    Attributes:
        has_credit: whether masks may be tried.
        values: by depth, how often a mask brought a token that a copy would not have brought, less what the slot of its
            guess costs.
        prices: of a step by its slots: the tokens that its time brings at the rate of late.
        mask_factor: how many times as much a step takes if some of its slots are masks.
        cheapest: the least that another slot costs, in tokens.
    """

    def __init__(self, costs: StepCosts, masks: int, accepted: Sequence[float] = (), *, trials: float = 0.005) -> None:
        self._seconds, self._trials = costs.by_slots, trials
        expected = [*accepted, *(_FIRST_ACCEPTED**depth for depth in range(len(accepted) + 1, masks + 1))]
        self._accepted = [Ema(value) for value in expected[:masks]]
        # of the longest match and of others, of the context and of other text
        self._copied = [[Ema(prior) for prior in _FIRST_COPIED] for _ in range(4)]
        self._tokens, self._mask_ratio = Ema(1.0), Ema(1.0)
        self._ratio, self._ratios = Ema(1.0), {size: Ema(1.0) for size in SIZES}
        self._credit, self.has_credit = _CREDIT, True
        self._since_plain = _MAX_WITHOUT_PLAIN
        self._refresh()

    @property
    def is_plain_due(self) -> bool:
        """Whether a plain step is to be timed again."""
        return self._since_plain >= _MAX_WITHOUT_PLAIN

    def copy_probability(self, text: Continuation, depth: int, rank: int) -> float:
        """Return the probability of a copied token, given those in front of it; rank 0 is the longest match's."""
        return self._copies(text, depth, rank).value

    def _copies(self, text: Continuation, depth: int, rank: int) -> Ema:
        # a copied token that was right makes the match longer by one
        length = min(text.match + depth, LONGEST_MATCH)
        return self._copied[(rank > 0) + 2 * text.is_context][length.bit_length() - 1]

    def add(self, step: Verified) -> None:
        """Take in what a proposal brought and what it cost."""
        self._add_copies(step.proposal.texts, step.tokens)
        self._add_guesses(step.proposal, step.tokens)
        self._add_costs(step)
        self._refresh()

    def _add_copies(self, texts: Sequence[Continuation], came: Sequence[int]) -> None:
        """Compare what could be copied with what came; it need not have been a candidate, so this costs no slot."""
        for rank, text in enumerate(texts):
            right = common_prefix_length(text.tokens, came)
            for depth in range(min(right + 1, len(came), len(text.tokens))):
                self._copies(text, depth, rank).add(depth < right)

    def _add_guesses(self, proposal: Proposal, came: Sequence[int]) -> None:
        """Count how far the masks were right, beyond what a copy brings too."""
        right = common_prefix_length(proposal.guesses, came)
        copied = max((common_prefix_length(text.tokens, came) for text in proposal.texts), default=0)
        for depth, accepted in enumerate(self._accepted, start=1):
            if not proposal.guesses:
                accepted.add(0, 0)
            elif depth <= len(came) or right < len(came):
                accepted.add(copied < depth <= right)

    def _add_costs(self, step: Verified) -> None:
        block, slots = step.proposal.block, step.proposal.block.num_slots
        expected = self._expected_seconds(slots)
        # a hiccup of the machine is no property of a block
        seconds = min(step.seconds, _LONGEST_HICCUP * expected)
        if block.anchors:
            self._mask_ratio.add(seconds / expected)
        else:
            self._ratio.add(seconds / self._seconds[slots])
            self._ratios[slots].add(seconds / self._seconds[slots])
        self._tokens.add(len(step.tokens), seconds / self._seconds[1])
        self._since_plain = 0 if slots == 1 else self._since_plain + 1
        plain_steps = seconds / self._expected_seconds(1)
        has_masks = slots > 1 and (block.anchors or step.proposal.guesses)
        gain = len(step.tokens) - plain_steps if has_masks else 0.0
        self._credit = min(_CREDIT, self._credit + self._trials * plain_steps + gain)
        self.has_credit = self._credit > 0 if self.has_credit else self._credit == _CREDIT

    def _expected_seconds(self, slots: int) -> float:
        return self._seconds[slots] * self._ratios[slots].towards(self._ratio.value)

    def _refresh(self) -> None:
        # tokens per second at which a step is worth its time
        rate = self._tokens.value / self._seconds[1]
        self.prices = filled_up({size: rate * self._expected_seconds(size) for size in SIZES})
        self.cheapest = min((self.prices[more] - self.prices[size]) / (more - size) for size, more in pairwise(SIZES))
        self.mask_factor = self._mask_ratio.value
        # a guess takes a slot of the next block, at the mean price of one
        slot = (self.prices[-1] - self.prices[1]) / (MAX_BLOCK_SLOTS - 1)
        self.values = [max(0.0, accepted.value - slot) for accepted in self._accepted]

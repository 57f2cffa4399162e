"""The paper's drafts: the same block at every step, a mask group behind each of its tokens, one guess per mask.

Source: SPACE paper (arXiv 2402.11809), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from space_cli.core.block import Block
from space_cli.core.drafting.guesses import Bigram, Guesses
from space_cli.core.drafting.ngrams import Continuation
from space_cli.core.sampling import TOP_K, StepLogits

Substitute = Callable[[Sequence[int], Sequence[int]], Sequence[int]]
"""Gets all tokens so far and the candidate of each slot, returns the candidates to use."""


@dataclass(frozen=True)
class Proposal:
    """A block and the token in each of its candidate slots.

    Attributes:
        guesses: the most probable token of each mask of the group before.
        texts: what could be copied, the longest match first. Neither need have become candidates.
    """

    block: Block
    candidates: Sequence[int]
    guesses: Sequence[int] = ()
    texts: Sequence[Continuation] = ()


@dataclass(frozen=True, slots=True)
class Verified:
    """A proposal after its model call: accepted slots (head first), tokens that came out, time of the step."""

    proposal: Proposal
    path: Sequence[int]
    tokens: Sequence[int]
    seconds: float


class Drafter(Protocol):
    """Proposes what the next model call verifies; lives as long as one generation."""

    max_slots: int

    def draft(self, tokens: Sequence[int], step_logits: StepLogits | None = None, group: range = range(0)) -> Proposal:
        """Propose what may follow `tokens` (prompt included), the last of which is the head.

        `step_logits` are the last step's, of which `group` belongs to the mask group behind the last accepted slot.
        """

    def observe(self, step: Verified) -> None:
        """Learn what became of a proposal; not called for the last step of a generation."""


class ChainDrafter:
    """One block for all steps, one guess per mask.

    Args:
        block: of each step.
        substitute: puts other candidates in place of the guesses.
        bigram: ties the guesses; the paper has none.
    """

    def __init__(self, block: Block, substitute: Substitute | None = None, bigram: Bigram | None = None) -> None:
        self.max_slots = block.num_slots
        self._block, self._substitute, self._bigram = block, substitute, bigram

    def draft(self, tokens: Sequence[int], step_logits: StepLogits | None = None, group: range = range(0)) -> Proposal:
        """Propose what the masks guess; a slot beyond them repeats the head."""
        guesses: list[int] = []
        if step_logits is not None and self._bigram is not None and group:
            guesses = Guesses(*step_logits.top_k(group, tokens, TOP_K), 1, self._bigram).chain(tokens[-1])
        elif step_logits is not None:
            for row in group:
                guesses.append(step_logits.token(row, [*tokens, *guesses]))
        depths = self._block.offsets[1 : self._block.num_tokens]
        candidates = [guesses[depth - 1] if depth <= len(guesses) else tokens[-1] for depth in depths]
        return Proposal(self._block, candidates if self._substitute is None else self._substitute(tokens, candidates))

    def observe(self, step: Verified) -> None:
        """Learn nothing: the block stays the same."""

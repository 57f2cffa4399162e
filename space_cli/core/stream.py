"""What decoding hands out: steps as they happen and the record of a whole generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal, NamedTuple

FinishReason = Literal["eos", "stop_string", "length"]


def is_repetitive(tokens: Sequence[int]) -> bool:
    """Return whether an output loops: tokens over distinct tokens above 3.5, as in the published evaluation."""
    return len(tokens) > 3.5 * len(set(tokens))


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two token sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class Parts(NamedTuple):
    """Seconds of a step by phase; prefill and the stop rule are not included.

    On a GPU the model's part is only the launching; choosing waits for the tokens.
    """

    model: float
    choosing: float
    cache: float
    drafting: float


@dataclass(frozen=True, slots=True)
class Step:
    """One model call.

    Attributes:
        tokens: the token ids that came out, in order; cut where the generation ended.
        accepted: how many of them were candidates accepted in this step.
        candidates: what had been proposed, in slot order; empty for AR.
        rejected: those of them that stood where the first token behind the accepted ones now stands.
        slots: rows of the model call.
        seconds: wall time, with the prefill in the first step.
        finish_reason: why the generation ended with this step, or None.
        prefilled: tokens of the prompt that our decoder computed before this step; a cache may have held the others.
        parts: of the seconds; None where it was not our decoder's step.
        depth: how many tokens ahead the candidates reached.
        logprobs: where asked for, of each token: itself and then the most probable ones, each with its log-probability.
    """

    tokens: tuple[int, ...]
    accepted: int
    candidates: tuple[int, ...]
    rejected: tuple[int, ...]
    slots: int
    seconds: float
    finish_reason: FinishReason | None = None
    prefilled: int = 0
    parts: Parts | None = None
    depth: int = 0
    logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(slots=True)
class Generation:
    """The steps of one answer, in order."""

    steps: list[Step] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """All token ids, the end-of-sequence token included."""
        return [token for step in self.steps for token in step.tokens]

    @property
    def seconds(self) -> float:
        """Wall time of all steps, prefill included."""
        return sum(step.seconds for step in self.steps)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs or after an interruption."""
        return self.steps[-1].finish_reason if self.steps else None

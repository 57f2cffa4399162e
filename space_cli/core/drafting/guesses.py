"""What masks guess, each guess tied to the token in front of it.

Masks guess independently of each other, so the most probable tokens of two neighbours may not go together. A bigram of
low rank, trained along with them, weighs each mask's most probable tokens by the one before: it costs microseconds, and
no model call.

Source: a small head over the token before, as in arXiv 2507.11851, of low rank and on a shortlist.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Bigram:
    """What a token says of the next one: mask j's logit of v behind u grows by gates[j] x previous[u] · following[v].

    Attributes:
        previous: (V, r) float32.
        following: (V, r) float32.
        gates: (m, r) float32.
    """

    previous: np.ndarray
    following: np.ndarray
    gates: np.ndarray


class Guesses:
    """The tokens that a mask group guesses.

    Args:
        tokens: (m, K) int64, the K most probable ones of each mask.
        probs: (m, K) float32, their probabilities, in descending order.
        width: how many of a mask are told.
        bigram: ties them; None leaves them as they are.
    """

    def __init__(self, tokens: np.ndarray, probs: np.ndarray, width: int, bigram: Bigram | None = None) -> None:
        self._tokens, self._probs, self._width, self._bigram = tokens, probs, width, bigram
        self._known: dict[tuple[int, int], list[tuple[int, float]]] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def after(self, depth: int, token: int) -> list[tuple[int, float]]:
        """Return what mask `depth` (0 is the first) guesses behind `token`, with probabilities in descending order."""
        key = (depth, token if self._bigram is not None else 0)
        if key not in self._known:
            self._known[key] = self._weighed(depth, token)
        return self._known[key]

    def chain(self, head: int) -> list[int]:
        """Return the most probable token of each mask, the first behind `head` and each other behind the one before."""
        tokens = [head]
        for depth in range(len(self)):
            tokens.append(self.after(depth, tokens[-1])[0][0])
        return tokens[1:]

    def _weighed(self, depth: int, token: int) -> list[tuple[int, float]]:
        tokens, probs = self._tokens[depth], self._probs[depth]
        if self._bigram is None:
            tokens, probs = tokens[: self._width], probs[: self._width]
        else:
            before = self._bigram.previous[token] * self._bigram.gates[min(depth, len(self._bigram.gates) - 1)]
            weights = probs * np.exp(self._bigram.following[tokens] @ before)
            order = (-weights).argsort(kind="stable")[: self._width]
            # what is not on the shortlist keeps its weight
            tokens, probs = tokens[order], weights[order] / (weights.sum() + 1 - probs.sum())
        return list(zip(tokens.tolist(), probs.tolist(), strict=True))

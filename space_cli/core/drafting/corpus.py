"""Text that does not change: any number of tokens, of which a step looks at a few dozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from space_cli.core.drafting.ngrams import BRANCHES, LONGEST_MATCH, MAX_COPIED, SEPARATOR, Continuation

_BITS, _PACKED = 21, 3
_SORTED_BY = 2 * _PACKED
_NEAREST = 4


@dataclass(frozen=True)
class SortedText:
    """Token ids and every place between them, sorted by the tokens in front of it, the nearest first.

    The longest matches lie next to where the newest tokens would be sorted in. Arrays may be memory maps.

    Attributes:
        tokens: (N) int32; texts end with `SEPARATOR`.
        places: (N) uint32, sorted by `_SORTED_BY` tokens.
        starts: (V + 2) int64, by token + 1, where places behind that token begin.
    """

    tokens: np.ndarray
    places: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, on_progress: Callable[[float], None] = lambda _: None) -> SortedText:
        """Sort a text; a second for three million tokens.

        Args:
            tokens: (N) int32, each below 2^20.
            on_progress: gets the share that is done.
        """
        near = np.zeros(len(tokens) + _PACKED, dtype=np.uint64)
        # the token i places in front of place p is near[p + _PACKED - i]
        near[_PACKED:] = tokens + 1
        packed = np.zeros(len(tokens), dtype=np.uint64)
        for distance in range(1, _PACKED + 1):
            packed = packed << np.uint64(_BITS) | near[_PACKED - distance : -distance]
        order = np.argsort(packed)
        on_progress(0.4)
        changed = np.concatenate([[False], packed[order[1:]] != packed[order[:-1]]])
        rank = np.zeros(len(tokens) + _PACKED, dtype=np.uint64)
        rank[order + _PACKED] = np.cumsum(changed)
        on_progress(0.6)
        places = np.argsort(rank[_PACKED:] << np.uint64(32) | rank[:-_PACKED]).astype(np.uint32)
        # place 0 has nothing in front of it
        counts = np.bincount(np.concatenate([[0], tokens[:-1] + 1]), minlength=int(tokens.max(initial=0)) + 2)
        on_progress(1.0)
        return cls(tokens, places, np.concatenate([[0], np.cumsum(counts)]))

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """Return a few continuations of `tokens` that begin differently, the longest match first."""
        if tokens[-1] + 2 >= len(self.starts):
            return []
        newest = list(tokens[: -_SORTED_BY - 1 : -1])
        first, last = int(self.starts[tokens[-1] + 1]), int(self.starts[tokens[-1] + 2])
        low, high = first, last
        while low < high:
            middle = (low + high) // 2
            if self._before(int(self.places[middle]), _SORTED_BY) < newest:
                low = middle + 1
            else:
                high = middle
        nearest = self.places[max(first, low - _NEAREST) : min(last, low + _NEAREST)].tolist()
        context = list(tokens[: -LONGEST_MATCH - 1 : -1])
        found: dict[int, tuple[int, int]] = {}
        for place in nearest:
            token, match = int(self.tokens[place]), self._match(place, context)
            if token != SEPARATOR and match > found.get(token, (0, 0))[0]:
                found[token] = (match, place)
        best = sorted(found.values(), reverse=True)[:BRANCHES]
        return [Continuation(match, self._copied(place), is_context=False) for match, place in best]

    def _before(self, place: int, most: int) -> list[int]:
        """Return the tokens in front of a place, the nearest first."""
        before: list[int] = self.tokens[max(0, place - most) : place].tolist()
        return before[::-1]

    def _match(self, place: int, context: Sequence[int]) -> int:
        length = 0
        for one, other in zip(self._before(place, LONGEST_MATCH), context, strict=False):
            if one != other:
                break
            length += 1
        return length

    def _copied(self, place: int) -> list[int]:
        copied: list[int] = self.tokens[place : place + MAX_COPIED].tolist()
        return copied[: copied.index(SEPARATOR)] if SEPARATOR in copied else copied

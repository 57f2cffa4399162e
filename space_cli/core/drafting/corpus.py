"""Text that does not change: any number of tokens, of which a step looks at a few dozen."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from space_cli.core.drafting.ngrams import SEPARATOR, Continuation, continuations

_SORTED_BY, _NEAREST = 6, 4


class SortedText:
    """Token ids and all places between them, sorted by the tokens in front of each, the nearest first.

    The longest matches lie next to where the newest tokens would be sorted in.

    Args:
        tokens: (N) int32; texts end with `SEPARATOR`.
        places: (N) uint32, sorted by `_SORTED_BY` tokens, then by themselves. Both may be memory maps.
    """

    def __init__(self, tokens: np.ndarray, places: np.ndarray) -> None:
        self.tokens, self.places = tokens, places
        # single items of these are ints, and come several times as fast as those of arrays
        self._text, self._places = tokens.data, places.data

    @classmethod
    def of(cls, tokens: np.ndarray, on_progress: Callable[[float], None] = lambda _: None) -> SortedText:
        """Sort a text; `on_progress` gets the fraction that is done."""
        token_bits, rank_bits = int(tokens.max(initial=0) + 1).bit_length(), len(tokens).bit_length()
        # each of 1, 2 and 3 divides `_SORTED_BY`
        at_once = min(3, (64 - rank_bits) // token_bits)
        packed, places = _packed(tokens, token_bits, at_once), np.arange(len(tokens), dtype=np.uint32)
        for farthest in range(_SORTED_BY, 0, -at_once):
            # values with their ranks in them sort stably, and ten times as fast as argsort does
            keyed = packed[places + (_SORTED_BY - farthest)]
            keyed <<= rank_bits
            keyed |= np.arange(len(keyed), dtype=np.uint64)
            keyed.sort()
            keyed &= (1 << rank_bits) - 1
            places = places[keyed]
            on_progress(1 - (farthest - at_once) / _SORTED_BY)
        return cls(tokens, places)

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """See `Source`."""
        at = bisect_left(self._places, list(tokens[: -_SORTED_BY - 1 : -1]), key=self._before)
        nearest = self._places[max(0, at - _NEAREST) : at + _NEAREST]
        places = [place for place in nearest if place and self._text[place - 1] == tokens[-1]]
        found = continuations(self._text, [place for place in places if self._text[place] != SEPARATOR], tokens)
        return [text._replace(is_context=False) for text in found]

    def _before(self, place: int) -> list[int]:
        """Return the tokens in front of a place, the nearest first."""
        return self._text[max(0, place - _SORTED_BY) : place].tolist()[::-1]


def _packed(tokens: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return `count` tokens in each value, the last of them on top; `_SORTED_BY` zeros come first."""
    padded = np.concatenate([np.zeros(_SORTED_BY, np.uint64), (tokens + 1).astype(np.uint64)])
    packed = padded
    for last in range(1, count):
        packed = padded[last:] << last * bits | packed[:-1]
    return packed

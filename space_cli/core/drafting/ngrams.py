"""Where the newest tokens stood before, and what followed them there.

Source: LLMA (arXiv 2304.04487), prompt lookup decoding; several texts at once as in SuffixDecoding (arXiv 2411.04975).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

LONGEST_MATCH, MAX_COPIED = 16, 31
BRANCHES, SEPARATOR = 3, -1
# n of the n-grams that are looked up; of places with the same n-gram the newest are compared
_LENGTHS, _PLACES = (3, 1), 8


class Continuation(NamedTuple):
    """What followed a place whose last `match` tokens (`LONGEST_MATCH` at most) are the newest ones."""

    match: int
    tokens: list[int]
    is_context: bool = True


class Source(Protocol):
    """Text to copy from."""

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """Return a few continuations of `tokens` that begin differently, the longest match first, then the newest."""


def continuations(text: Sequence[int], places: Iterable[int], tokens: Sequence[int]) -> list[Continuation]:
    """Return what follows the best of `places`, as `Source.lookup` does; each place is behind the last of `tokens`.

    A text that runs into its own end goes on as it did, as loops do; one that has ended has a `SEPARATOR` there.
    """
    # of places that the same token follows, the last stays
    matches = {text[end]: (match, end) for match, end in sorted((_match(text, end, tokens), end) for end in places)}
    found = []
    for match, end in sorted(matches.values(), reverse=True)[:BRANCHES]:
        copied = list(text[end : end + MAX_COPIED])
        if SEPARATOR in copied:
            copied = copied[: copied.index(SEPARATOR)]
        elif len(copied) < MAX_COPIED:
            copied = (copied * MAX_COPIED)[:MAX_COPIED]
        found.append(Continuation(match, copied))
    return found


def _match(text: Sequence[int], end: int, tokens: Sequence[int]) -> int:
    length, longest = 1, min(end, len(tokens), LONGEST_MATCH)
    while length < longest and text[end - length - 1] == tokens[-length - 1]:
        length += 1
    return length


class NgramIndex:
    """N-grams of a text as it grows, and of other texts (token ids) that were there before."""

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self.text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._start = 0
        for text in texts:
            self.add(text)

    def add(self, text: Sequence[int]) -> None:
        """Take in a finished text; no match reaches from one text into another."""
        self.extend(text)
        self.text.append(SEPARATOR)
        self._start = len(self.text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new of the growing text, all of whose tokens these are."""
        old = len(self.text)
        self.text += tokens[old - self._start :]
        # n-grams that something follows
        for end in range(max(old, self._start + 1), len(self.text)):
            for length in _LENGTHS:
                if end - length >= self._start:
                    self._places.setdefault(tuple(self.text[end - length : end]), []).append(end)

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """See `Source`."""
        for length in _LENGTHS:
            places = self._places.get(tuple(tokens[-length:]))
            if places:
                return continuations(self.text, places[-_PLACES:], tokens)
        return []

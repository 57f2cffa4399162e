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


class NgramIndex:
    """N-grams of a text as it grows, and of other texts (token ids) that were there before."""

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self._ends: dict[int, dict[tuple[int, ...], list[int]]] = {length: {} for length in _LENGTHS}
        self._text: list[int] = []
        self._start = 0
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._text)

    def add(self, text: Sequence[int]) -> None:
        """Take in a finished text; no match reaches from one text into another."""
        self.extend(text)
        self._text.append(SEPARATOR)
        self._start = len(self._text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new of the growing text, all of whose tokens these are."""
        old = len(self._text)
        self._text += tokens[old - self._start :]
        # n-grams that something follows
        for end in range(max(old, self._start + 1), len(self._text)):
            for length, ends in self._ends.items():
                if end - length >= self._start:
                    ends.setdefault(tuple(self._text[end - length : end]), []).append(end)

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """Return a few continuations of `tokens` that begin differently, the longest match first, then the newest."""
        for length, ends in self._ends.items():
            places = ends.get(tuple(tokens[-length:]), ())[-_PLACES:]
            if places:
                matches = sorted(((self._match(tokens, end, length), end) for end in places), reverse=True)
                first = {self._text[end]: (match, end) for match, end in reversed(matches)}
                best = sorted(first.values(), reverse=True)[:BRANCHES]
                return [Continuation(match, self._copied(end)) for match, end in best]
        return []

    def _match(self, tokens: Sequence[int], end: int, length: int) -> int:
        text, longest = self._text, min(end, len(tokens), LONGEST_MATCH)
        while length < longest and text[end - length - 1] == tokens[-length - 1]:
            length += 1
        return length

    def _copied(self, end: int) -> list[int]:
        """Return what follows `end`; a text that runs into its own end goes on as it did, as loops do."""
        copied = self._text[end : end + MAX_COPIED]
        if SEPARATOR in copied:
            return copied[: copied.index(SEPARATOR)]
        return copied if len(copied) == MAX_COPIED else (copied * MAX_COPIED)[:MAX_COPIED]

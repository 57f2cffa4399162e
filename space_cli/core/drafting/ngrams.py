"""Where the newest tokens stood before, and what followed them there.

Source: LLMA (arXiv 2304.04487) and prompt lookup decoding; several continuations as in suffix decoding
(arXiv 2411.04975).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

LONGEST_MATCH = 16
MAX_COPIED = 31
_LENGTHS = (4, 3, 2, 1)
"""n of the n-grams that are looked up, the longest first."""
_PLACES, _BRANCHES = 8, 3
_SEPARATOR = -1


class Continuation(NamedTuple):
    """What followed an earlier place whose last `match` tokens are the newest ones (counted up to `LONGEST_MATCH`)."""

    match: int
    tokens: list[int]


class Source(Protocol):
    """Text to copy from."""

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """Return a few continuations of `tokens`, the longest match first, then the newest."""


class NgramIndex:
    """N-grams of a text as it grows, and of other texts that were there before.

    Args:
        texts: token ids to copy from besides.
    """

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self._ends: dict[int, dict[tuple[int, ...], list[int]]] = {length: {} for length in _LENGTHS}
        self._text: list[int] = []
        self._start = self._indexed = 0
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._text)

    def add(self, text: Sequence[int]) -> None:
        """Take in a finished text; a match never reaches from one text into another."""
        self.extend(text)
        self._text.append(_SEPARATOR)
        self._start = self._indexed = len(self._text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new of the growing text: all of its tokens, as they are now."""
        text = self._text
        text.extend(tokens[len(text) - self._start :])
        # the n-grams that something follows
        for end in range(max(self._indexed, self._start + 1), len(text)):
            for length, ends in self._ends.items():
                if end - length >= self._start:
                    ends.setdefault(tuple(text[end - length : end]), []).append(end)
        self._indexed = len(text)

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """Return a few continuations of `tokens`, the longest match first, then the newest."""
        for length, ends in self._ends.items():
            places = ends.get(tuple(tokens[-length:]))
            if places is not None:
                matches = sorted(((self._match(tokens, end, length), end) for end in places[-_PLACES:]), reverse=True)
                return self._continuations(matches)
        return []

    def _match(self, tokens: Sequence[int], end: int, length: int) -> int:
        text, longest = self._text, min(end, len(tokens), LONGEST_MATCH)
        while length < longest and text[end - length - 1] == tokens[-length - 1]:
            length += 1
        return length

    def _continuations(self, matches: Iterable[tuple[int, int]]) -> list[Continuation]:
        found: list[Continuation] = []
        for match, end in matches:
            copied = self._copied_from(end)
            if all(copied[0] != other.tokens[0] for other in found):
                found.append(Continuation(match, copied))
            if len(found) == _BRANCHES:
                break
        return found

    def _copied_from(self, end: int) -> list[int]:
        """Return what follows `end`; a text that runs into its own end goes on as it did, as loops do."""
        copied = self._text[end : end + MAX_COPIED]
        if _SEPARATOR in copied:
            return copied[: copied.index(_SEPARATOR)]
        return copied if len(copied) == MAX_COPIED else (copied * MAX_COPIED)[:MAX_COPIED]

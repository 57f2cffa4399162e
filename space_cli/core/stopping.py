"""When a generation ends: end-of-sequence ids, stop strings, number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from space_cli.core.stream import FinishReason

Decode = Callable[[list[int]], str]
"""Text of token ids, as a tokenizer's `decode` gives it."""

_TAIL = 16


class TextStream:
    """Incremental detokeniser: yields pieces of text that later tokens cannot change.

    Each piece is the difference between two decodes of a short tail: what a token adds depends on its neighbours (byte
    fallback, merged spaces), and an unfinished multi-byte character must wait for its last byte.

    Source: the offsets of text-generation-inference and vLLM (`detokenize_incrementally`).

    Args:
        decode: gives the text of token ids.
        before: the tokens that the text goes on from: a prompt's, as SentencePiece shows a leading space behind others
            alone.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tail = tail_of(decode, before)
        self._shown = len(self._tail)

    def push(self, token: int) -> str:
        """Add a token; return the text that is final now, empty while a character is incomplete."""
        self._tail.append(token)
        before = self._decode(self._tail[: self._shown])
        text = self._decode(self._tail)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        piece = text[len(before) :]
        # tokens with empty text, such as special tokens, cannot anchor the next decode
        if self._decode(self._tail[self._shown :]):
            self._tail = self._tail[self._shown :]
        self._shown = len(self._tail)
        return piece

    def flush(self) -> str:
        """Return the rest, an incomplete character as U+FFFD."""
        piece = self._decode(self._tail)[len(self._decode(self._tail[: self._shown])) :]
        self._tail, self._shown = [], 0
        return piece


def tail_of(decode: Decode, token_ids: Sequence[int]) -> list[int]:
    """Return the last token ids, enough of them to detokenise what follows."""
    count = _TAIL
    while count < len(token_ids) and not decode(list(token_ids[-count:])).strip():
        count *= 2
    return list(token_ids[-count:])


def text_behind(decode: Decode, before: Sequence[int], token_ids: Sequence[int]) -> str:
    """Return the text that `token_ids` add after the tokens `before`."""
    tail = tail_of(decode, before)
    return decode([*tail, *token_ids])[len(decode(tail)) :]


@dataclass(frozen=True, slots=True)
class StopRule:
    """When a generation ends; `begin()` applies the rules to one generation.

    Attributes:
        max_new_tokens: exact upper bound of the tokens that come out.
        eos_token_ids: a generation ends with the first of them, and includes it.
        stop_strings: it ends with the first token by which one of them stands in the generated text.
        decode: turns token ids into text; needed for stop strings.
    """

    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    decode: Decode | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.stop_strings and self.decode is None:
            raise ValueError("stop strings need a way to decode tokens")
        if "" in self.stop_strings:
            raise ValueError("a stop string cannot be empty")

    def begin(self, prompt_ids: Sequence[int] = ()) -> StopState:
        """Return the state of one generation behind a prompt under these rules."""
        return StopState(self, prompt_ids)


class StopState:
    """The progress of one generation towards its stop rules."""

    def __init__(self, rule: StopRule, prompt_ids: Sequence[int] = ()) -> None:
        self._rule = rule
        self._count = 0
        self._text = ""
        self._keep = max(map(len, rule.stop_strings), default=0) - 1
        self._stream = TextStream(rule.decode, prompt_ids) if rule.stop_strings and rule.decode else None

    def push(self, token: int) -> FinishReason | None:
        """Add a token; return why the generation ends with it, or None."""
        self._count += 1
        if token in self._rule.eos_token_ids:
            return "eos"
        if self._stream is not None:
            self._text += self._stream.push(token)
            if any(stop in self._text for stop in self._rule.stop_strings):
                return "stop_string"
            self._text = self._text[-self._keep :] if self._keep else ""
        return "length" if self._count >= self._rule.max_new_tokens else None

    def push_all(self, tokens: Sequence[int]) -> tuple[int, FinishReason | None]:
        """Add tokens; return how many of them belong to the generation, and why it ends there, or None."""
        for index, token in enumerate(tokens, start=1):
            reason = self.push(token)
            if reason is not None:
                return index, reason
        return len(tokens), None


class HeldBack:
    """Streams text up to the first stop string; holds back text that may become one.

    Args:
        stop_strings: none of them empty.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop = stop_strings
        self._held = ""
        self._ended = False

    def push(self, text: str) -> str:
        """Add text; return what is final now, nothing after a stop string."""
        if self._ended:
            return ""
        self._held += text
        cut = cut_at_stop(self._held, self._stop)
        self._ended = len(cut) < len(self._held)
        safe = len(cut) if self._ended else len(cut) - _begun(cut, self._stop)
        self._held, final = "" if self._ended else self._held[safe:], cut[:safe]
        return final

    def flush(self) -> str:
        """Return the text held back, which did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop_strings: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
    longest = max(map(len, stop_strings), default=1) - 1
    ends = range(min(longest, len(text)), 0, -1)
    return next((size for size in ends if any(stop.startswith(text[-size:]) for stop in stop_strings)), 0)


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Return `text` up to the first stop string in it."""
    return text[: min((found for stop in stop_strings if (found := text.find(stop)) >= 0), default=len(text))]

"""Answers: pieces of text with the step that produced them, and whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Required, TypedDict

from space_cli.core.stopping import HeldBack, TextStream

if TYPE_CHECKING:
    from space_cli.api.tools import CallReader, ToolCall
    from space_cli.core.stream import FinishReason, Step
    from space_cli.models.loading import LoadedModel


class Message(TypedDict, total=False):
    """One turn of a conversation, as chat templates know it."""

    role: Required[str]
    content: str | None
    name: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with the model's own log-probability, before temperature, penalties and grammar.

    Attributes:
        top: the most probable tokens at this place, largest first, with theirs.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """The text that one model call made final.

    Attributes:
        text: may be empty, while a character or what may be a stop string is unfinished.
        step: the model call.
        logprobs: of the step's tokens, where asked for.
        tool_calls: that the step completed.
    """

    text: str
    step: Step
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    Attributes:
        text: without special tokens, cut in front of a stop string.
        token_ids: every token that came out, those that ended the answer included.
        prompt_tokens: length of the prompt.
        cached_tokens: of those, how many an earlier answer had left in the cache.
        finish_reason: eos, stop_string or length; None where it was left before its end.
        steps: one for each model call.
        logprobs: of the tokens, where asked for.
        tool_calls: where tools were offered and the format of the model's calls is known.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: FinishReason | None
    steps: tuple[Step, ...] = field(repr=False)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of all steps, prefill included."""
        return sum(step.seconds for step in self.steps)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per model call."""
        return len(self.token_ids) / len(self.steps) if self.steps else 0.0

    @property
    def accepted_drafts(self) -> int:
        """Number of accepted candidates."""
        return sum(step.accepted for step in self.steps)

    @property
    def rejected_drafts(self) -> int:
        """Number of rejected candidates."""
        return sum(len(step.candidates) - step.accepted for step in self.steps)


class AnswerText:
    """Turns steps into text as they arrive.

    Args:
        loaded: whose tokens they are.
        prompt_ids: that the text goes on from.
        stop: the text ends in front of the first of these.
        reader: reads calls out of it, or None.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        reader: CallReader | None = None,
    ) -> None:
        self._loaded, self._reader = loaded, reader
        self._stream = TextStream(partial(loaded.decode, skip_special_tokens=True), prompt_ids)
        self._held = HeldBack(stop)

    def piece(self, step: Step) -> Piece:
        """Return the text that a step has made final."""
        num_calls = 0 if self._reader is None else len(self._reader.calls)
        text = self._held.push(self._said(step))
        if step.finish_reason is not None:
            text += self._held.flush()
        calls = () if self._reader is None else tuple(self._reader.calls[num_calls:])
        return Piece(text, step, tuple(self._logprob(token) for token in step.logprobs), calls)

    def _said(self, step: Step) -> str:
        if self._reader is not None:
            return self._reader.read(step)
        text = "".join(self._stream.push(token) for token in step.tokens)
        return text if step.finish_reason is None else text + self._stream.flush()

    def _logprob(self, known: tuple[tuple[int, float], ...]) -> TokenLogprob:
        """Return the first token with the others as alternatives."""
        own, *top = (TokenLogprob(token, self._loaded.decode([token]), value) for token, value in known)
        return TokenLogprob(own.token_id, own.text, own.logprob, tuple(top))

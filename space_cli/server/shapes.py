"""Responses in OpenAI's formats, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from space_cli import __version__
from space_cli.api import Answer, Piece, TokenLogprob, ToolCall

Json = dict[str, Any]
FINGERPRINT = f"space-{__version__}"
_REASONS = {"eos": "stop", "stop_string": "stop", "length": "length"}


@dataclass(frozen=True, slots=True)
class Begun:
    """A request is under way."""


@dataclass(frozen=True, slots=True)
class Came:
    """A piece of the answer number `index`, and when it came (of `time.monotonic`)."""

    index: int
    piece: Piece
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Done:
    """The answer number `index`, whole, to the prompt of that number."""

    index: int
    answer: Answer
    prompt: int


Event = Begun | Came | Done


class Shape(Protocol):
    """Renders the events of one request."""

    def chunks(self, event: Event) -> Iterator[Json]:
        """Yield the chunks of an event."""

    def whole(self, done: Sequence[Done]) -> Json:
        """Return the whole response."""

    def usage_chunk(self, done: Sequence[Done]) -> Json:
        """Return the last chunk of a stream whose usage is requested."""


class _Shape:
    """The part that both formats share.

    Args:
        model: its public name.
        prefix: of the id.
        kind: the `object` of a whole response, and that of a chunk.
    """

    def __init__(self, model: str, prefix: str, kind: tuple[str, str]) -> None:
        self._kind = kind
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def _chunk(self, choices: list[Json], **more: object) -> Json:
        return {**self._head, "object": self._kind[1], "choices": choices, **more}

    def _whole(self, choices: list[Json], done: Sequence[Done]) -> Json:
        return {**self._head, "object": self._kind[0], "choices": choices, "usage": usage_of(done)}

    def usage_chunk(self, done: Sequence[Done]) -> Json:
        """Return the last chunk of a stream whose usage is requested."""
        return self._chunk([], usage=usage_of(done))


class ChatShape(_Shape):
    """`/v1/chat/completions`."""

    def __init__(self, model: str, *, logprobs: bool) -> None:
        super().__init__(model, "chatcmpl", ("chat.completion", "chat.completion.chunk"))
        self._has_logprobs = logprobs
        self._begun: set[int] = set()
        self._calls: dict[int, int] = {}

    def chunks(self, event: Event) -> Iterator[Json]:
        """Yield the chunks of an event."""
        if isinstance(event, Begun):
            return
        if event.index not in self._begun:
            self._begun.add(event.index)
            yield self._delta(event.index, {"role": "assistant", "content": ""})
        if isinstance(event, Came) and (event.piece.text or event.piece.logprobs):
            yield self._delta(event.index, {"content": event.piece.text}, self._logprobs(event.piece.logprobs))
        if isinstance(event, Came) and event.piece.tool_calls:
            # whole ones: a call is known once it is complete
            first = self._calls.get(event.index, 0)
            self._calls[event.index] = first + len(event.piece.tool_calls)
            calls = [{"index": first + n, **_call(call)} for n, call in enumerate(event.piece.tool_calls)]
            yield self._delta(event.index, {"tool_calls": calls})
        if isinstance(event, Done):
            yield self._delta(event.index, {}, reason=reason_of(event.answer))

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def whole(self, done: Sequence[Done]) -> Json:
        """Return the whole response."""
        choices = [
            {
                "index": each.index,
                "message": _message(each.answer),
                "logprobs": self._logprobs(each.answer.logprobs),
                "finish_reason": reason_of(each.answer),
            }
            for each in done
        ]
        return self._whole(choices, done)

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not self._has_logprobs:
            return None
        content = [_with_bytes(token) | {"top_logprobs": [_with_bytes(each) for each in token.top]} for token in tokens]
        return {"content": content, "refusal": None}


class CompletionShape(_Shape):
    """`/v1/completions`.

    Args:
        model: its public name.
        logprobs: whether they are returned.
        echoes: by index, what each text begins with.
    """

    def __init__(self, model: str, *, logprobs: bool, echoes: Sequence[str]) -> None:
        super().__init__(model, "cmpl", ("text_completion", "text_completion"))
        self._has_logprobs, self._echoes = logprobs, echoes
        self._lengths = dict.fromkeys(range(len(echoes)), 0)

    def chunks(self, event: Event) -> Iterator[Json]:
        """Yield the chunks of an event."""
        if isinstance(event, Begun):
            return
        echo = self._echoes[event.index] if self._lengths[event.index] == 0 else ""
        if isinstance(event, Came) and (echo or event.piece.text or event.piece.logprobs):
            logprobs = self._logprobs(event.piece.logprobs, self._lengths[event.index] + len(echo))
            self._lengths[event.index] += len(echo) + len(event.piece.text)
            yield self._text(event.index, echo + event.piece.text, logprobs)
        if isinstance(event, Done):
            yield self._text(event.index, "", None, reason_of(event.answer))

    def _text(self, index: int, text: str, logprobs: Json | None, reason: str | None = None) -> Json:
        return self._chunk([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}])

    def whole(self, done: Sequence[Done]) -> Json:
        """Return the whole response."""
        choices = [
            {
                "index": each.index,
                "text": self._echoes[each.index] + each.answer.text,
                "logprobs": self._logprobs(each.answer.logprobs, len(self._echoes[each.index])),
                "finish_reason": reason_of(each.answer),
            }
            for each in done
        ]
        return self._whole(choices, done)

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> Json | None:
        if not self._has_logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{each.text: each.logprob for each in token.top} for token in tokens],
            "text_offset": offsets,
        }


def reason_of(answer: Answer) -> str | None:
    """Return why an answer ended, in OpenAI's words."""
    if answer.tool_calls and answer.finish_reason != "length":
        return "tool_calls"
    return None if answer.finish_reason is None else _REASONS[answer.finish_reason]


def usage_of(done: Sequence[Done]) -> Json:
    """Return a request's token usage; each prompt counts once, however many answers it has."""
    answers = [each.answer for each in done]
    prompts = {each.prompt: each.answer for each in reversed(done)}.values()
    prompt, completion = sum(answer.prompt_tokens for answer in prompts), sum(len(each.token_ids) for each in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(answer.accepted_drafts for answer in answers),
            "rejected_prediction_tokens": sum(answer.rejected_drafts for answer in answers),
            "reasoning_tokens": 0,
        },
    }


def _message(answer: Answer) -> Json:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    if not answer.tool_calls:
        return message
    return message | {"content": answer.text or None, "tool_calls": [_call(call) for call in answer.tool_calls]}


def _call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.json_arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _with_bytes(token: TokenLogprob) -> Json:
    # the bytes of a partial character are lost once it is text
    encoded = None if "\N{REPLACEMENT CHARACTER}" in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": token.logprob, "bytes": encoded}

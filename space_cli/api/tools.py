"""Tool calls: offered to a model by its chat template, and parsed from its answers where the format is known.

The format is the tokenizer's own `response_template`, or the one that transformers has for the model's architecture.
For other models calls stay what they are: text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from space_cli.core.stopping import TextStream
from space_cli.errors import UsageProblem

if TYPE_CHECKING:
    from space_cli.core.stream import Step
    from space_cli.models.loading import LoadedModel

Tool = Mapping[str, Any]
"""A function as OpenAI's interface describes it: {"type": "function", "function": {"name", "parameters", ...}}."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model requests.

    Attributes:
        arguments: as the model gave them; text where they are no JSON.
    """

    name: str
    arguments: Any

    @property
    def json_arguments(self) -> str:
        """The arguments as a JSON string, as OpenAI's clients expect."""
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments, ensure_ascii=False)


class CallReader:
    """Parses an answer as it arrives: separates text from tool calls.

    Args:
        loaded: whose answer it is.
        template: a `response_template` of transformers.
        prompt_ids: in front of the answer; a template may have begun it there.
        tools: that are offered to the model.
    """

    def __init__(
        self, loaded: LoadedModel, template: Mapping[str, Any], prompt_ids: Sequence[int], tools: Sequence[Tool]
    ) -> None:
        self._ends = loaded.eos_token_ids
        # the marks of a call may be special tokens
        self._stream = TextStream(loaded.decode, prompt_ids)
        self._parser: Any = loaded.tokenizer.get_response_parser(
            dict(template), prefix=loaded.decode(list(prompt_ids)), tools=[dict(tool) for tool in tools]
        )
        self._begun = ""
        self.calls: list[ToolCall] = []

    def read(self, step: Step) -> str:
        """Return the text that a step adds; collect its calls."""
        text = "".join(self._stream.push(token) for token in step.tokens if token not in self._ends)
        if step.finish_reason is None:
            return self._said(text)
        return self._said(text + self._stream.flush(), is_last=True)

    def _said(self, text: str, *, is_last: bool = False) -> str:
        if self._parser is None:
            return text
        try:
            events = self._parser.feed(text) + (self._parser.finalize()[1] if is_last else [])
        except (ValueError, KeyError):
            # not a call after all: it is shown as text
            self._parser = None
            return self._begun + text
        said = ""
        for event in events:
            is_call, kind = event.get("field") == "tool_calls", event["type"]
            if is_call and kind == "region_chunk":
                self._begun += event["text"]
            elif is_call and kind == "region_close":
                self._begun = ""
                self._note(event["value"])
            elif kind == "region_chunk":
                said += event["text"]
        return said

    def _note(self, call: Any) -> None:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            self.calls.append(ToolCall(function["name"], function.get("arguments", {})))


def response_template(loaded: LoadedModel) -> Mapping[str, Any] | None:
    """Return the format in which a model writes calls, or None if it is unknown."""
    own = getattr(loaded.tokenizer, "response_template", None)
    if own is not None or not hasattr(loaded.tokenizer, "get_response_parser"):
        return own
    try:
        # what `transformers serve` knows of architectures whose tokenizers do not say it
        known = import_module("transformers.cli.serving.utils").get_response_template
    except (ImportError, AttributeError):
        return None
    template: Mapping[str, Any] | None = known(loaded.tokenizer, loaded.model)
    return template


def check_tools(tools: Sequence[Any]) -> None:
    """Raise `UsageProblem` unless every tool is a function with a name."""
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageProblem('a tool is no {"type": "function", "function": {"name": ...}}')

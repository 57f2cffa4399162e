"""Request bodies of OpenAI's interface; fields that cannot be honoured are refused, harmless ones ignored."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from space_cli import limits
from space_cli.api import Message
from space_cli.server.errors import ApiError

MAX_CHOICES, MAX_STOPS, MAX_PROMPTS, MAX_TOKENS = 8, 16, 16, 2**20
_Text = Annotated[str, Field(min_length=1)]


class TextPart(BaseModel):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """A function with its arguments as JSON."""

    name: str
    arguments: str


class Call(BaseModel):
    """A tool call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def message(self) -> Message:
        """Return it as chat templates take it."""
        message = Message(role="system" if self.role == "developer" else self.role, content=text_of(self.content))
        if self.name:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(BaseModel):
    """A function's name, description and parameters, as the model sees them."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] = {}


class ToolBody(BaseModel):
    """A tool."""

    type: Literal["function"]
    function: Function


class Prediction(BaseModel):
    """The predicted answer, used as a draft."""

    type: Literal["content"]
    content: str | list[TextPart]


class JsonSchema(BaseModel):
    """A schema with its name."""

    name: str = ""
    json_schema: Annotated[dict[str, Any], Field(alias="schema")] = {}


class ResponseFormat(BaseModel):
    """The requested format of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a json_schema is missing")
        return self

    def options(self) -> dict[str, Any]:
        """Return the settings of an answer in this format."""
        schema = self.json_schema.json_schema if self.type == "json_schema" and self.json_schema else None
        return {"json_schema": schema, "json_mode": self.type == "json_object"}


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    include_usage: bool = False


class _Request(BaseModel):
    """Fields of both kinds of request."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    temperature: limits.Temperature | None = None
    top_p: limits.TopP | None = None
    top_k: limits.TopK | None = None
    min_p: limits.MinP | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: _Text | Annotated[list[_Text], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    presence_penalty: limits.CountPenalty | None = None
    frequency_penalty: limits.CountPenalty | None = None
    repetition_penalty: limits.RepetitionPenalty | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        """Refuse unsupported fields that would change the answer."""
        for name, harmless in _NOT_HERE.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in harmless:
                raise ApiError(400, f"{name} is not supported", code="unsupported_parameter", param=name)
        return self

    @property
    def most_tokens(self) -> int | None:
        """Largest number of tokens of an answer; None if the request sets none."""
        return self.max_tokens

    def options(self, default_tokens: int) -> dict[str, Any]:
        """Return the requested settings of an answer."""
        settings = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
        }
        seed = secrets.randbelow(2**63) if self.seed is None else self.seed % 2**63
        settings |= self.response_format.options() if self.response_format else {}
        given = {name: value for name, value in settings.items() if value is not None}
        return given | {"seed": seed, "max_new_tokens": self.most_tokens or default_tokens}


# fields of OpenAI's that would change an answer, with the values that change nothing
_NOT_HERE: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"], []),
    "suffix": ("",),
    "web_search_options": (),
}


class ChatRequest(_Request):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    prediction: Prediction | None = None
    tools: Annotated[list[ToolBody], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def allowed_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def most_tokens(self) -> int | None:
        """Largest number of tokens of an answer; None if the request sets none."""
        return self.max_completion_tokens or self.max_tokens

    def options(self, default_tokens: int) -> dict[str, Any]:
        """Return the requested settings of an answer."""
        return super().options(default_tokens) | {
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "prediction": text_of(self.prediction.content) if self.prediction else "",
        }


class CompletionRequest(_Request):
    """The body of `/v1/completions`."""

    prompt: str | list[int] | Annotated[list[str], Field(max_length=MAX_PROMPTS)] | list[list[int]]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(each, int) for each in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def options(self, default_tokens: int) -> dict[str, Any]:
        """Return the requested settings of an answer."""
        return super().options(default_tokens) | {"logprobs": self.logprobs}


def text_of(content: str | list[TextPart] | None) -> str:
    """Return the text of a content."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())

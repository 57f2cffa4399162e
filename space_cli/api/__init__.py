"""The Python interface: `load` a model, then `generate` or `stream`. The commands and the server answer through it."""

from space_cli.api.answers import Answer, Message, Piece, TokenLogprob
from space_cli.api.loading import load
from space_cli.api.model import Model, Stream
from space_cli.api.settings import GenerationSettings, Options
from space_cli.api.tools import Tool, ToolCall

__all__ = [
    "Answer",
    "GenerationSettings",
    "Message",
    "Model",
    "Options",
    "Piece",
    "Stream",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "load",
]

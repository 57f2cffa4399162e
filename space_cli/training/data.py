"""Training examples from files and from the Hub: five formats, recognised by their fields.

This module knows nothing of tokens: `chat_format` turns an example into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeAlias

from space_cli.errors import UsageProblem
from space_cli.models.prompting import Role, Turn
from space_cli.rows import HubDataset, Row, SourceRow, filled, read_rows, string

FORMATS = {
    "messages": "messages: [{role, content}, ...]",
    "sharegpt": "conversations: [{from, value}, ...]",
    "alpaca": "instruction, input (optional), output or response",
    "prompt-completion": "prompt, completion or response, history (optional)",
    "text": "text",
}
"""What is understood, and the fields it is recognised by."""

OWN_DATA = "self"
"""Given as a source, and standing as the place of its examples: what a model asks itself and answers (`own_data`)."""

_UNDERSTOOD = "understood are " + " | ".join(FORMATS.values())

_MESSAGES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT: dict[str, Role] = _MESSAGES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, of which the assistant's are learned; at least one of them answers something.

    Attributes:
        turns: as they stand in the data.
        where: file:line, or source and row, for messages about this example.
    """

    turns: tuple[Turn, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and the completion to learn, in no chat format."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it learned."""

    text: str
    where: str


Example: TypeAlias = Conversation | Completion | Text


@dataclass(frozen=True, slots=True)
class Loaded:
    """Examples of one source.

    Attributes:
        examples: in the order of the source.
        format: the name in `FORMATS` that was recognised.
        source: as the user gave it.
    """

    examples: list[Example]
    format: str
    source: str


def read_examples(
    source: str, *, limit: int | None = None, split: str = "train", revision: str | None = None
) -> Loaded:
    """Return the examples of a file or of a dataset on the Hub.

    Args:
        source: a file that ends in one of `rows.SUFFIXES` (JSON is an array of objects or one object a line), or else
            the id of a dataset on the Hub.
        limit: take only the first examples.
        split: of a dataset on the Hub.
        revision: branch, tag or commit of a dataset on the Hub.

    Raises:
        UsageProblem: nothing there, an unknown format, or a malformed row, named by its line where it has one.
    """
    rows = islice(read_rows(source, HubDataset(source, split, revision=revision)), limit)
    first = next(rows, None)
    if first is None:
        raise UsageProblem(f"{source}: no examples in it")
    name, parse = _recognise(_object(first), first.where)
    return Loaded([parse(_object(row), row.where) for row in chain([first], rows)], name, source)


def _object(row: SourceRow) -> Row:
    if not isinstance(row.value, dict):
        raise UsageProblem(f"{row.where}: not a JSON object", hint=_UNDERSTOOD)
    return row.value


# Formats: each parses one row


def _recognise(row: Row, where: str) -> tuple[str, Callable[[Any, str], Example]]:
    """Return the format of the first row, and the parser that demands it of all."""
    if "messages" in row:
        return "messages", partial(_listed, field="messages", keys=("role", "content"), roles=_MESSAGES)
    if "conversations" in row:
        return "sharegpt", partial(_listed, field="conversations", keys=("from", "value"), roles=_SHAREGPT)
    if "instruction" in row and (answer := _first(row, "output", "response")):
        return "alpaca", partial(_alpaca, answer=answer)
    if "prompt" in row and (answer := _first(row, "completion", "response")):
        return "prompt-completion", partial(_pair, answer=answer, chat="history" in row)
    if "text" in row:
        return "text", lambda row, where: Text(filled(row.get("text"), "text", where), where)
    fields = ", ".join(map(repr, row)) or "none"
    raise UsageProblem(f"{where}: the fields {fields} are no known format", hint=_UNDERSTOOD)


def _first(row: Row, *fields: str) -> str:
    return next((field for field in fields if field in row), "")


def _listed(row: Row, where: str, *, field: str, keys: tuple[str, str], roles: Mapping[str, Role]) -> Example:
    return _conversation(_turns(row.get(field), field, where, keys=keys, roles=roles), where)


def _alpaca(row: Row, where: str, *, answer: str) -> Example:
    request = filled(row.get("instruction"), "instruction", where)
    # databricks-dolly calls its input `context`
    for field in ("input", "context"):
        if row.get(field) is not None and (given := string(row[field], field, where)).strip():
            request = f"{request}\n\n{given}"
    response = filled(row.get(answer), answer, where)
    return _conversation([Turn("user", request), Turn("assistant", response)], where)


def _pair(row: Row, where: str, *, answer: str, chat: bool) -> Example:
    """Parse a prompt and its answer: strings, strings with a history, or lists of messages (TRL's form)."""
    if isinstance(row.get("prompt"), list):
        asked, answered = (
            _turns(row.get(field), field, where, keys=("role", "content"), roles=_MESSAGES)
            for field in ("prompt", answer)
        )
        if all(turn.role != "assistant" for turn in answered):
            raise UsageProblem(f"{where}: {answer!r} must hold an assistant turn")
        return _conversation(asked + answered, where)
    prompt, response = filled(row.get("prompt"), "prompt", where), filled(row.get(answer), answer, where)
    history = row.get("history")
    if not chat and history is None:
        return Completion(prompt, response, where)
    turns = [*_history(history, where), Turn("user", prompt), Turn("assistant", response)]
    return _conversation(turns, where)


def _history(history: object, where: str) -> Iterator[Turn]:
    if not isinstance(history, (list, type(None))):
        raise UsageProblem(f"{where}: 'history' must be a list of [user, assistant] pairs")
    for index, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UsageProblem(f"{where}: 'history[{index}]' must be a pair of strings, [user, assistant]")
        yield Turn("user", string(pair[0], f"history[{index}][0]", where))
        yield Turn("assistant", filled(pair[1], f"history[{index}][1]", where))


def _turns(given: object, field: str, where: str, *, keys: tuple[str, str], roles: Mapping[str, Role]) -> list[Turn]:
    said_by, said = keys
    if not isinstance(given, list):
        raise UsageProblem(f"{where}: {field!r} must be a list of turns with {said_by!r} and {said!r}")
    turns = []
    for index, turn in enumerate(given):
        at = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise UsageProblem(f"{where}: '{at}' must be an object with {said_by!r} and {said!r}")
        name = string(turn.get(said_by), f"{at}.{said_by}", where)
        if name not in roles:
            raise UsageProblem(f"{where}: '{at}.{said_by}' is {name!r}; known are {', '.join(roles)}")
        check = filled if roles[name] == "assistant" else string
        turns.append(Turn(roles[name], check(turn.get(said), f"{at}.{said}", where)))
    return turns


def _conversation(turns: list[Turn], where: str) -> Conversation:
    if all(turn.role != "assistant" for turn in turns[1:]):
        raise UsageProblem(f"{where}: the conversation has no assistant turn that answers something")
    return Conversation(tuple(turns), where)

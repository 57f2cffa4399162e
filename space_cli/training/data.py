"""Training examples from files and from the Hub: five formats, recognised by their fields, and plain text.

A row that teaches nothing, an empty answer for one, is left out and counted; a malformed one is an error.
This module knows nothing of tokens: `chat_format` turns an example into them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from space_cli.chat.templates import Role, Turn
from space_cli.errors import UsageProblem
from space_cli.files import expanded
from space_cli.rows import HubDataset, Row, SourceRow, read_rows, string
from space_cli.training.documents import SUFFIXES as TEXT_SUFFIXES
from space_cli.training.documents import read_documents

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
_KEYS = {"role", "content", "from", "value"}
_OF_TOOLS = {"tool", "function", "function_call", "observation", "ipython"}
"""Roles of turns that a chat of text alone has no place for."""

_EMPTY, _TOOLS = "nothing to learn", "calls of tools"
_ERRORS_TOLD = 3


class _LeftOut(Exception):
    """A row that is left out, with the reason."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns; the assistant's are learned, and at least one of them answers something.

    Attributes:
        turns: as they stand in the data.
        where: file:line, or source and row, for messages about this example.
    """

    turns: tuple[Turn, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and the completion to learn, without a chat format."""

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
        left_out: rows that are no examples, by reason.
        unused: fields of turns that say something and have no place in training.
        apart: what separates the documents of plain text; empty for other files.
    """

    examples: list[Example]
    format: str
    source: str
    left_out: Mapping[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    apart: str = ""

    @property
    def summary(self) -> str:
        """The source in one line, with what was left out of it."""
        parts = [f"{self.source}: {len(self.examples)} examples, format {self.format}"]
        parts += [f"documents apart at {self.apart}"] if self.apart else []
        parts += [f"{count} left out: {reason}" for reason, count in self.left_out.items()]
        parts += [f"not used: {', '.join(self.unused)}"] if self.unused else []
        return ", ".join(parts)


def read_examples(
    source: str, *, limit: int | None = None, split: str = "train", revision: str | None = None
) -> Loaded:
    """Return the examples of a file or of a dataset on the Hub.

    Args:
        source: a file that ends in one of `rows.SUFFIXES` (JSON is an array of objects or one object a line), plain
            text that ends in .txt or .txt.gz, or else the id of a dataset on the Hub.
        limit: take only the first examples.
        split: of a dataset on the Hub.
        revision: branch, tag or commit of a dataset on the Hub.

    Raises:
        UsageProblem: nothing there, an unknown format, or malformed rows, named by their lines where they have some.
    """
    rows, apart = _rows(source, HubDataset(source, split, revision=revision))
    first = next(rows, None)
    if first is None:
        raise UsageProblem(f"{source}: no examples in it")
    name, parse = _recognise(_object(first), first.where)
    found = _Found()
    for row in chain([first], rows):
        found.take(row, parse)
        if len(found.examples) == limit:
            break
    found.check(source)
    return Loaded(found.examples, name, source, dict(found.left_out), tuple(found.unused), apart)


def _rows(source: str, hub: HubDataset) -> tuple[Iterator[SourceRow], str]:
    """Return the rows of a source, and for plain text what separates its documents."""
    file = Path(expanded(source))
    if source.lower().endswith(TEXT_SUFFIXES) and file.is_file():
        documents, apart = read_documents(file)
        return iter(documents), apart
    return read_rows(source, hub), ""


@dataclass(slots=True)
class _Found:
    """Counts of the rows read so far."""

    examples: list[Example] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unused: dict[str, None] = field(default_factory=dict)
    errors: list[UsageProblem] = field(default_factory=list)

    def take(self, row: SourceRow, parse: Callable[[Any, str], Example]) -> None:
        try:
            self.examples.append(parse(_object(row), row.where))
            self.unused |= dict.fromkeys(_unused(row.value))
        except _LeftOut as reason:
            self.left_out[str(reason)] += 1
        except UsageProblem as error:
            self.errors.append(error)

    def check(self, source: str) -> None:
        """Refuse a source with malformed rows, listing the first ones, or one without usable rows."""
        if self.errors:
            first = self.errors[:_ERRORS_TOLD]
            more = f"; and {len(self.errors) - len(first)} more such rows" if len(self.errors) > len(first) else ""
            raise UsageProblem("; ".join(error.message for error in first) + more, hint=first[0].hint)
        if not self.examples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            raise UsageProblem(f"{source}: no examples in it: {reasons}")


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
        return "text", lambda row, where: Text(_said(row, "text", where), where)
    fields = ", ".join(map(repr, row)) or "none"
    raise UsageProblem(f"{where}: the fields {fields} are no known format", hint=_UNDERSTOOD)


def _first(row: Row, *fields: str) -> str:
    return next((field for field in fields if field in row), "")


def _listed(row: Row, where: str, *, field: str, keys: tuple[str, str], roles: Mapping[str, Role]) -> Example:
    turns = _turns(row.get(field), field, where, keys=keys, roles=roles)
    return _conversation(_with_system(row, turns, where), where)


def _alpaca(row: Row, where: str, *, answer: str) -> Example:
    request = _said(row, "instruction", where)
    # databricks-dolly calls its input `context`
    for name in ("input", "context"):
        if row.get(name) is not None and (given := string(row[name], name, where)).strip():
            request = f"{request}\n\n{given}"
    response = _said(row, answer, where)
    turns = [*_history(row.get("history"), where), Turn("user", request), Turn("assistant", response)]
    return _conversation(_with_system(row, turns, where), where)


def _pair(row: Row, where: str, *, answer: str, chat: bool) -> Example:
    """Parse a prompt and its answer: strings, strings with a history, or lists of messages (TRL's format)."""
    if isinstance(row.get("prompt"), list):
        asked, answered = (
            _turns(row.get(field), field, where, keys=("role", "content"), roles=_MESSAGES)
            for field in ("prompt", answer)
        )
        if all(turn.role != "assistant" for turn in answered):
            raise UsageProblem(f"{where}: {answer!r} must hold an assistant turn")
        return _conversation(_with_system(row, asked + answered, where), where)
    prompt, response = _said(row, "prompt", where), _said(row, answer, where)
    history = row.get("history")
    if not chat and history is None and not row.get("system"):
        return Completion(prompt, response, where)
    turns = [*_history(history, where), Turn("user", prompt), Turn("assistant", response)]
    return _conversation(_with_system(row, turns, where), where)


def _said(row: Row, field: str, where: str) -> str:
    """Return the text of a field; a row in which it is empty is left out."""
    if field in row and (row[field] is None or (isinstance(row[field], str) and not str(row[field]).strip())):
        raise _LeftOut(_EMPTY)
    if not isinstance(row.get(field), str):
        raise UsageProblem(f"{where}: {field!r} must be a non-empty string")
    return string(row[field], field, where)


def _with_system(row: Row, turns: list[Turn], where: str) -> list[Turn]:
    """Prepend a row's `system` text as a turn; rows that describe tools are left out."""
    if row.get("tools"):
        raise _LeftOut(_TOOLS)
    if row.get("system") is None or not (system := string(row["system"], "system", where)).strip():
        return turns
    if turns and turns[0].role == "system":
        if turns[0].content.strip() != system.strip():
            raise UsageProblem(f"{where}: 'system' is not what the system turn says")
        return turns
    return [Turn("system", system), *turns]


def _unused(row: Row) -> Iterable[str]:
    """Yield the names of turn fields other than role and content."""
    for name in ("messages", "conversations", "prompt", "completion", "response"):
        turns = row.get(name)
        for turn in turns if isinstance(turns, list) else ():
            yield from (f"{name}.{key}" for key, value in turn.items() if value and key not in _KEYS)


def _history(history: object, where: str) -> Iterator[Turn]:
    if not isinstance(history, (list, type(None))):
        raise UsageProblem(f"{where}: 'history' must be a list of [user, assistant] pairs")
    for index, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UsageProblem(f"{where}: 'history[{index}]' must be a pair of strings, [user, assistant]")
        yield Turn("user", string(pair[0], f"history[{index}][0]", where))
        yield Turn("assistant", _answer_said(pair[1], f"history[{index}][1]", where))


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
        if name in _OF_TOOLS or turn.get("tool_calls") or turn.get("function_call"):
            raise _LeftOut(_TOOLS)
        if name not in roles:
            raise UsageProblem(f"{where}: '{at}.{said_by}' is {name!r}; known are {', '.join(roles)}")
        check = _answer_said if roles[name] == "assistant" and said in turn else string
        turns.append(Turn(roles[name], check(turn.get(said), f"{at}.{said}", where)))
    return turns


def _answer_said(value: object, field: str, where: str) -> str:
    """Return the answer's text; a conversation with an empty one is left out."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _LeftOut(_EMPTY)
    return string(value, field, where)


def _conversation(turns: list[Turn], where: str) -> Conversation:
    if all(turn.role != "assistant" for turn in turns[1:]):
        raise _LeftOut(_EMPTY)
    return Conversation(tuple(turns), where)

"""Training examples from files and from the Hub: five formats, recognised by their fields.

This module knows nothing of tokens: `chat_format` turns an example into them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from space_cli.errors import UsageProblem
from space_cli.models.prompting import Role, Turn

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv")

FORMATS = {
    "messages": "messages: [{role, content}, ...]",
    "sharegpt": "conversations: [{from, value}, ...]",
    "alpaca": "instruction, input (optional), output or response",
    "prompt-completion": "prompt, completion or response, history (optional)",
    "text": "text",
}
"""What is understood, and the fields it is recognised by."""

_NO_SPACE = re.compile(r"[^ \t\r\n]")

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

Row: TypeAlias = Mapping[str, object]


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
        source: a file that ends in one of `SUFFIXES` (JSON is an array of objects or one object a line), or else the
            id of a dataset on the Hub.
        limit: take only the first examples.
        split: of a dataset on the Hub.
        revision: branch, tag or commit of a dataset on the Hub.

    Raises:
        UsageProblem: nothing there, an unknown format, or a malformed row, named by its line where it has one.
    """
    rows = islice(_rows(source, split, revision), limit)
    first = next(rows, None)
    if first is None:
        raise UsageProblem(f"{source}: no examples in it")
    name, parse = _recognise(_object(*first), first[0])
    return Loaded([parse(_object(where, row), where) for where, row in chain([first], rows)], name, source)


def _object(where: str, row: object) -> Row:
    if not isinstance(row, dict):
        raise UsageProblem(f"{where}: not a JSON object", hint=_UNDERSTOOD)
    return row


# Sources: each yields where a row stands, and the row


def _rows(source: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    file = Path(source)
    try:
        known, there = source.lower().endswith(SUFFIXES), file.exists()
    except OSError as error:  # a name too long for the file system
        raise UsageProblem(f"{source}: {error.strerror or error}") from error
    if not known and not there:
        return _hub(source, split, revision)
    if not there:
        raise UsageProblem(f"no file named {source!r}")
    if not known or not file.is_file():
        kind = "a folder" if file.is_dir() else "no kind of file that is read"
        raise UsageProblem(f"{source}: {kind}", hint=f"give a file in {', '.join(SUFFIXES)} or a dataset id of the Hub")
    return _file(file)


def _file(file: Path) -> Iterator[tuple[str, Any]]:
    read = {".parquet": _parquet, ".csv": _csv}.get(file.suffix.lower(), _json)
    try:
        yield from read(file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageProblem(f"{file}: damaged gzip file: {error}") from error
    except OSError as error:
        raise UsageProblem(f"{file}: {error.strerror or error}") from error


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of JSON Lines as they are read, or those of a JSON array."""
    name = file.name.lower()
    opened = gzip.open if name.endswith(".gz") else open
    with opened(file, "rb") as stream:
        if name.removesuffix(".gz").endswith(".jsonl"):
            yield from _json_lines(stream, file)
            return
        content = stream.read()
    if content.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        yield from _json_array(_decode(content, file), file)
    else:
        yield from _json_lines(content.split(b"\n"), file)


def _json_lines(lines: Iterable[bytes], file: Path) -> Iterator[tuple[str, Any]]:
    # JSON Lines ends lines with \n alone: str.splitlines would cut inside strings that hold U+2028 and the like
    for number, line in enumerate(lines, start=1):
        content = line.removeprefix(BOM_UTF8) if number == 1 else line
        if content.strip():
            yield f"{file}:{number}", _parse(content, f"{file}:{number}")


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{where}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error


def _not_json(where: str, error: ValueError | RecursionError) -> UsageProblem:
    # the decoder's own line counts from where it began; a ValueError alone is a number of too many digits
    told = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
    return UsageProblem(f"{where}: not JSON: {told}")


def _json_array(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements one by one, which keeps their line numbers, as json.loads would not."""
    decoder = json.JSONDecoder()
    position = _next_sign(text, text.index("[") + 1)
    counted, line = 0, 1
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise _not_json(f"{file}:{at}", error) from error
        yield f"{file}:{line}", row
        position = _next_sign(text, position)
        if text.startswith(",", position):
            position = _next_sign(text, position + 1)
        elif not text.startswith("]", position):
            raise UsageProblem(f"{file}:{_line_of(text, position)}: not JSON: the array wants a comma or its end")
    if (position := _next_sign(text, position + 1)) < len(text):
        raise UsageProblem(f"{file}:{_line_of(text, position)}: not JSON: something follows the array")


def _next_sign(text: str, position: int) -> int:
    """Return where the whitespace that JSON allows ends."""
    sign = _NO_SPACE.search(text, position)
    return sign.start() if sign else len(text)


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    # the standard library's reader keeps every cell a string and knows its line; those of datasets and pyarrow do not
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_decode(file.read_bytes(), file), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = f"{file}:{line}", reader.line_num + 1
            if not header:
                header = cells
            elif len(cells) > len(header):
                raise UsageProblem(f"{where}: {len(cells)} cells under a header of {len(header)}")
            elif cells:
                yield where, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise UsageProblem(f"{file}:{line}: not CSV: {error}") from error


def _decode(content: bytes, file: Path) -> str:
    content = content.removeprefix(BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageProblem(f"{file}:{line}: not UTF-8 text") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageProblem(f"{file}: reading Parquet needs pyarrow", hint="pip install datasets") from error
    try:
        with ParquetFile(file) as parquet:
            rows = (row for batch in parquet.iter_batches() for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"{file}: not readable as Parquet: {_line(error)}") from error


def _hub(source: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UsageProblem(f"no file named {source!r}, and no dataset on the Hub can have that name")
    try:
        import datasets  # type: ignore[import-untyped]
        from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # httpx's, under any of its names
    except ImportError as error:
        missing = f"no file named {source!r}, and datasets of the Hub need a package that is missing"
        raise UsageProblem(missing, hint="pip install datasets") from error
    try:
        rows = datasets.load_dataset(source, split=split, revision=revision)
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        problem = f"no file named {source!r}, and no dataset of that name could be loaded from the Hub"
        raise UsageProblem(f"{problem}: {_line(error)}") from error
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def _line(error: Exception) -> str:
    """Return what an exception of a library says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


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
        return "text", lambda row, where: Text(_filled(row.get("text"), "text", where), where)
    fields = ", ".join(map(repr, row)) or "none"
    raise UsageProblem(f"{where}: the fields {fields} are no known format", hint=_UNDERSTOOD)


def _first(row: Row, *fields: str) -> str:
    return next((field for field in fields if field in row), "")


def _listed(row: Row, where: str, *, field: str, keys: tuple[str, str], roles: Mapping[str, Role]) -> Example:
    return _conversation(_turns(row.get(field), field, where, keys=keys, roles=roles), where)


def _alpaca(row: Row, where: str, *, answer: str) -> Example:
    request = _filled(row.get("instruction"), "instruction", where)
    # databricks-dolly calls its input `context`
    for field in ("input", "context"):
        if row.get(field) is not None and (given := _string(row[field], field, where)).strip():
            request = f"{request}\n\n{given}"
    response = _filled(row.get(answer), answer, where)
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
    prompt, response = _filled(row.get("prompt"), "prompt", where), _filled(row.get(answer), answer, where)
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
        yield Turn("user", _string(pair[0], f"history[{index}][0]", where))
        yield Turn("assistant", _filled(pair[1], f"history[{index}][1]", where))


def _turns(given: object, field: str, where: str, *, keys: tuple[str, str], roles: Mapping[str, Role]) -> list[Turn]:
    said_by, said = keys
    if not isinstance(given, list):
        raise UsageProblem(f"{where}: {field!r} must be a list of turns with {said_by!r} and {said!r}")
    turns = []
    for index, turn in enumerate(given):
        at = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise UsageProblem(f"{where}: '{at}' must be an object with {said_by!r} and {said!r}")
        name = _string(turn.get(said_by), f"{at}.{said_by}", where)
        if name not in roles:
            raise UsageProblem(f"{where}: '{at}.{said_by}' is {name!r}; known are {', '.join(roles)}")
        check = _filled if roles[name] == "assistant" else _string
        turns.append(Turn(roles[name], check(turn.get(said), f"{at}.{said}", where)))
    return turns


def _conversation(turns: list[Turn], where: str) -> Conversation:
    if all(turn.role != "assistant" for turn in turns[1:]):
        raise UsageProblem(f"{where}: the conversation has no assistant turn that answers something")
    return Conversation(tuple(turns), where)


def _filled(value: object, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageProblem(f"{where}: {field!r} must be a non-empty string")
    return _string(value, field, where)


def _string(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UsageProblem(f"{where}: {field!r} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair; no tokenizer takes it
        raise UsageProblem(f"{where}: {field!r} holds half of a surrogate pair") from error
    return value

"""Rows of files and of datasets on the Hub, each with the place it stands at.

This module knows neither what the rows are for nor which fields they have.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from space_cli.errors import UsageProblem, opening
from space_cli.files import expanded
from space_cli.text import decoded, marked_encoding, read_text

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv")

Row: TypeAlias = Mapping[str, object]

_NO_SPACE = re.compile(r"[^ \t\r\n]")


class SourceRow(NamedTuple):
    """A row and where it stands.

    Attributes:
        source: file or dataset.
        unit: what `number` counts, from 1.
        value: an object where the source is well-formed.
    """

    source: str
    unit: Literal["line", "row"]
    number: int
    value: Any

    @property
    def where(self) -> str:
        """As messages about this row begin."""
        return f"{self.source}:{self.number}" if self.unit == "line" else f"{self.source}, row {self.number}"


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A dataset on the Hub.

    Attributes:
        file: in the dataset, read as it is where `datasets` cannot load the whole.
    """

    id: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    file: str | None = None


def read_rows(source: str, hub: HubDataset) -> Iterator[SourceRow]:
    """Return the rows of a file or of a dataset on the Hub.

    Args:
        source: a file that ends in one of `SUFFIXES` (JSON is an array of objects or one object a line), or else the
            id of a dataset on the Hub.
        hub: how a dataset of the Hub is loaded, whatever its id.

    Raises:
        UsageProblem: nothing there, or no kind of file that is read; malformed content, while the rows are read.
    """
    file = Path(expanded(source))
    with opening(source):  # a name can be too long for the file system
        known, there = source.lower().endswith(SUFFIXES), file.exists()
    if not known and not there:
        return _named_on_hub(source, hub)
    if not there:
        raise UsageProblem(f"no file named {source!r}")
    if not known or not file.is_file():
        kind = "a folder" if file.is_dir() else "no kind of file that is read"
        raise UsageProblem(f"{source}: {kind}", hint=f"give a file in {', '.join(SUFFIXES)} or a dataset id of the Hub")
    return read_file(file)


def read_file(file: Path) -> Iterator[SourceRow]:
    """Yield the rows of a file; one of no kind known by its name is read as JSON.

    Raises:
        UsageProblem: not there, not readable, or malformed.
    """
    read = {".parquet": _parquet, ".csv": _csv}.get(file.suffix.lower(), _json)
    with reading(file):
        yield from read(file)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn an OSError within, or damage to a gzip file, into a `UsageProblem` that names the file."""
    with opening(file):
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UsageProblem(f"{file}: damaged gzip file: {error}") from error


def _json(file: Path) -> Iterator[SourceRow]:
    """Yield the rows of JSON Lines as they are read, or those of a JSON array."""
    name = file.name.lower()
    opened = gzip.open if name.endswith(".gz") else open
    with opened(file, "rb") as stream:
        first = stream.readline()
        if name.removesuffix(".gz").endswith(".jsonl") and marked_encoding(first)[0] == "utf-8":
            yield from _json_lines(chain([first.removeprefix(BOM_UTF8)], stream), file)
            return
        content = first + stream.read()
    encoding, start = marked_encoding(content)
    if content[start:].decode(encoding, "replace").lstrip().startswith("["):
        yield from _json_array(decoded(content, str(file)), file)
    elif encoding == "utf-8":
        # line by line: yield valid rows before reporting undecodable bytes
        yield from _json_lines(content[start:].split(b"\n"), file)
    else:
        yield from _json_lines(decoded(content, str(file)).encode().split(b"\n"), file)


def _json_lines(lines: Iterable[bytes], file: Path) -> Iterator[SourceRow]:
    # JSON Lines ends lines with \n alone: str.splitlines would cut inside strings that hold U+2028 and the like
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield SourceRow(str(file), "line", number, _parse(line, f"{file}:{number}"))


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{where}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error


def _not_json(where: str, error: ValueError | RecursionError) -> UsageProblem:
    # the decoder's own line counts from where it began; a ValueError alone is a number of too many digits
    reason = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
    return UsageProblem(f"{where}: not JSON: {reason}")


def _json_array(text: str, file: Path) -> Iterator[SourceRow]:
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
        yield SourceRow(str(file), "line", line, row)
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


def _csv(file: Path) -> Iterator[SourceRow]:
    # the standard library's reader keeps every cell a string and knows its line; those of datasets and pyarrow do not
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            begun, line = line, reader.line_num + 1
            if not header:
                header = cells
            elif len(cells) > len(header):
                raise UsageProblem(f"{file}:{begun}: {len(cells)} cells under a header of {len(header)}")
            elif cells:
                yield SourceRow(str(file), "line", begun, dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise UsageProblem(f"{file}:{line}: not CSV: {error}") from error


def _parquet(file: Path) -> Iterator[SourceRow]:
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageProblem(f"{file}: reading Parquet needs pyarrow", hint="pip install datasets") from error
    try:
        with ParquetFile(file) as parquet:
            rows = (row for batch in parquet.iter_batches() for row in batch.to_pylist())
            yield from _numbered(str(file), rows)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"{file}: not readable as Parquet: {_line(error)}") from error


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[SourceRow]:
    return (SourceRow(source, "row", number, row) for number, row in enumerate(rows, start=1))


def _named_on_hub(source: str, hub: HubDataset) -> Iterator[SourceRow]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UsageProblem(f"no file named {source!r}, and no dataset on the Hub can have that name")
    try:
        return read_hub(replace(hub, id=source))
    except UsageProblem as problem:
        raise UsageProblem(f"no file named {source!r}, and {problem.message}", hint=problem.hint) from problem


def read_hub(dataset: HubDataset) -> Iterator[SourceRow]:
    """Return the rows of a dataset on the Hub.

    Raises:
        UsageProblem: out of reach or not to be loaded; the message names no dataset.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
        from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # httpx's, under any of its names
    except ImportError as error:
        missing = "datasets of the Hub need a package that is missing"
        raise UsageProblem(missing, hint="pip install datasets") from error
    # report an unreachable Hub once, by the error, and not with every retry
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    name, revision = dataset.id, dataset.revision
    config = [] if dataset.config is None else [dataset.config]
    try:
        if dataset.file is not None:
            return read_file(Path(hf_hub_download(name, dataset.file, repo_type="dataset", revision=revision)))
        return _numbered(name, load_dataset(name, *config, split=dataset.split, revision=revision))
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        problem = "no dataset of that name could be loaded from the Hub"
        raise UsageProblem(f"{problem}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """Return what an exception of a library says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# Fields


def filled(value: object, field: str, where: str) -> str:
    """Return a field's value if it is a string that says something.

    Raises:
        UsageProblem: it is not.
    """
    if not isinstance(value, str) or not value.strip():
        raise UsageProblem(f"{where}: {field!r} must be a non-empty string")
    return string(value, field, where)


def string(value: object, field: str, where: str) -> str:
    """Return a field's value if it is a string that any tokenizer takes.

    Raises:
        UsageProblem: it is not.
    """
    if not isinstance(value, str):
        raise UsageProblem(f"{where}: {field!r} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair; no tokenizer takes it
        raise UsageProblem(f"{where}: {field!r} holds half of a surrogate pair") from error
    return value


def strings(value: object, field: str, where: str) -> tuple[str, ...]:
    """Return a field's value if it is a list of such strings.

    Raises:
        UsageProblem: it is not.
    """
    if not isinstance(value, list):
        raise UsageProblem(f"{where}: {field!r} must be a list of strings")
    return tuple(string(each, f"{field}[{index}]", where) for index, each in enumerate(value))


def identifier(row: Row, field: str, where: str, default: str = "") -> str:
    """Return what a row is known by, as a string; one that says nothing gets the default.

    Raises:
        UsageProblem: it is neither a string nor a number, or it is missing and there is no default.
    """
    value = row.get(field)
    if value is None and default:
        return default
    if not isinstance(value, (str, int)):
        raise UsageProblem(f"{where}: {field!r} must be a string or a number")
    return string(str(value), field, where)

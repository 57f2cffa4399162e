"""Files and folders that the user names, to copy drafts from: their tokens, sorted, and kept on disk."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from space_cli.core.drafting.corpus import SortedText
from space_cli.core.drafting.ngrams import SEPARATOR
from space_cli.errors import UsageProblem, system_reason
from space_cli.models.texts import cache_folder, hashed, tokenizer_state

_KEPT = 8
# characters; and how many of these are encoded at a time, so that the tokenizer's threads all have work
_PIECE, _BATCH = 1 << 16, 128
# where a file that is no text has a NUL byte, as git and grep see it
_HEAD = 1 << 13

OnProgress = Callable[[str, float], None]


class _File(NamedTuple):
    name: str
    size: int
    modified_ns: int


def read_corpus(
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[Path],
    on_progress: OnProgress = lambda *_: None,
    on_problem: Callable[[str], None] = lambda _: None,
) -> SortedText:
    """Return the sorted text of files and folders; it is kept on disk, and only files that have changed are read again.

    Hidden files and folders, links, and files that are no UTF-8 text are left out.

    Args:
        tokenizer: of the model.
        paths: files or folders.
        on_progress: gets what is being done, and the fraction of it that is done.
        on_problem: gets a line if some files cannot be read, and one if the sorted text cannot be kept.

    Raises:
        UsageProblem: a path is not there, or there is no text in any.
    """
    unread: list[OSError] = []
    files = list(dict.fromkeys(file for path in paths for file in _files(path, unread.append)))
    roots = sorted(os.path.realpath(path) for path in paths)
    folder = cache_folder() / f"corpus-{hashed(tokenizer_state(tokenizer), *roots)}"
    text, known = _read_kept(folder)
    if text is None or list(known) != files:
        known |= _encoded(tokenizer, [file for file in files if file not in known], on_progress, unread.append)
        rows = {file: known[file] for file in files if file in known}
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *rows.values()])
        if not len(tokens):
            raise UsageProblem(_line(unread) if unread else f"--corpus {', '.join(map(str, paths))}: no text in it")
        text = SortedText.of(tokens, lambda fraction: on_progress("sorting", fraction))
        try:
            _keep(text, rows, folder)
        except OSError as error:
            on_problem(f"the sorted --corpus could not be kept in {folder.parent}: {system_reason(error)}")
    if unread:
        on_problem(f"{_line(unread)}; left out{f', with {len(unread) - 1} more' if len(unread) > 1 else ''}")
    return text


def _line(unread: Sequence[OSError]) -> str:
    return f"--corpus {unread[0].filename}: {system_reason(unread[0])}"


def _files(path: Path, on_error: Callable[[OSError], None]) -> Iterator[_File]:
    top = os.path.realpath(path)
    if not os.path.isdir(top) and not os.path.isfile(top):
        raise UsageProblem(f"--corpus {path}: no such file or folder")
    for name in _names(top, on_error) if os.path.isdir(top) else [top]:
        try:
            found = os.lstat(name)
        except OSError as error:  # it was there a moment ago
            on_error(error)
            continue
        if stat.S_ISREG(found.st_mode):
            yield _File(name, found.st_size, found.st_mtime_ns)


def _names(top: str, on_error: Callable[[OSError], None]) -> Iterator[str]:
    for folder, folders, names in os.walk(top, onerror=on_error):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[_File],
    on_progress: OnProgress,
    on_error: Callable[[OSError], None],
) -> dict[_File, np.ndarray]:
    """Return the token ids of the files that can be read; none for one that is no text."""
    parts: dict[_File, list[np.ndarray]] = defaultdict(list)
    size, done = max(1, sum(file.size for file in files)), 0
    pieces = _pieces(files, on_error)
    while batch := list(islice(pieces, _BATCH)):
        for (file, _), ids in zip(batch, _ids(tokenizer, [piece for _, piece in batch]), strict=True):
            parts[file].append(np.array(ids, dtype=np.int32))
        done += sum(len(piece) for _, piece in batch)
        on_progress("reading", min(1.0, done / size))
    end = np.array([SEPARATOR], dtype=np.int32)
    # none behind no text
    return {file: np.concatenate([*rows, end[: len(rows[0])]]) for file, rows in parts.items()}


def _pieces(files: Iterable[_File], on_error: Callable[[OSError], None]) -> Iterator[tuple[_File, str]]:
    """Yield every file's text in pieces, one of which may be empty."""
    for file in files:
        try:
            text = _text(file.name)
        except OSError as error:
            on_error(error)
            continue
        for at in range(0, len(text) or 1, _PIECE):
            yield file, text[at : at + _PIECE]


def _text(name: str) -> str:
    """Return the text of a file; "" for one that is no UTF-8 text."""
    with open(name, "rb") as stream:
        content = stream.read(_HEAD)
        if b"\0" not in content:
            content += stream.read()
    try:
        return "" if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return ""


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return encoded
    backend.no_truncation()
    backend.no_padding()
    # without the offsets of tokens, which take a third of the time
    return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _read_kept(folder: Path) -> tuple[SortedText | None, dict[_File, np.ndarray]]:
    """Return the text that was kept, and the tokens of each of its files."""
    try:
        listed = json.loads((folder / "files.json").read_text("utf-8"))
        tokens = np.memmap(folder / "tokens", np.int32, "r").view(np.ndarray)
        places = np.memmap(folder / "places", np.uint32, "r").view(np.ndarray)
        os.utime(folder)
    except (OSError, ValueError):
        return None, {}
    ends = np.cumsum([count for *_, count in listed])
    if not len(tokens) == len(places) == ends[-1]:
        return None, {}
    rows = np.split(tokens, ends[:-1])
    return SortedText(tokens, places), {_File(*file): row for (*file, _), row in zip(listed, rows, strict=True)}


def _keep(text: SortedText, rows: dict[_File, np.ndarray], folder: Path) -> None:
    """Put a sorted text into the cache, whole or not at all; the least recently used ones are deleted."""
    listed = json.dumps([[*file, len(row)] for file, row in rows.items()])
    content: dict[str, memoryview | bytes] = {
        "tokens": text.tokens.data.cast("B"),
        "places": text.places.data.cast("B"),
        "files.json": listed.encode(),
    }
    temporary = Path(tempfile.mkdtemp(prefix="corpus-", dir=folder.parent))
    try:
        for name, data in content.items():
            # nobody else's to read, as the files it was made of may be
            with open(temporary / name, "wb", opener=partial(os.open, mode=0o600)) as stream:
                stream.write(data)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):
        for old in sorted(folder.parent.glob("corpus-*"), key=lambda each: each.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

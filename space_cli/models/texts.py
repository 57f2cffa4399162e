"""Texts outside the context to copy drafts from: past answers, and files that the user names."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path
from transformers import PreTrainedTokenizerBase

from space_cli.core.drafting.corpus import SortedText
from space_cli.core.drafting.ngrams import SEPARATOR, Continuation, NgramIndex
from space_cli.errors import UsageProblem, opening

MAX_TOKENS = 1 << 18
"""Tokens of past answers that are kept: about a megabyte of text, sorted in a tenth of a second."""
_UNSORTED = 1 << 15
_KEPT_CORPORA, _CHUNK = 8, 1 << 20
_PARTS = ("tokens", "places", "starts")


class PastAnswers:
    """Past answers of a model, those of this process and, with a file, those before.

    The file holds int32 token ids and can be read by its owner alone.

    Args:
        file: None forgets everything with the process.
        vocabulary: number of token ids; a file with others is not ours.
    """

    def __init__(self, file: Path | None = None, *, vocabulary: int = 1 << 20) -> None:
        self._file = file
        self._older = np.zeros(0, dtype=np.int32) if file is None else _read_own(file)
        if self._older.max(initial=0) >= vocabulary:
            self._older = self._older[:0]
        self._sort()

    def _sort(self) -> None:
        self._older = self._older[-MAX_TOKENS:]
        self._sorted = SortedText.of(self._older) if len(self._older) else None
        self._recent = NgramIndex()
        self._unsorted: list[np.ndarray] = []

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """Return a few continuations of `tokens`, from newer and from older answers."""
        found = [text._replace(is_context=False) for text in self._recent.lookup(tokens)]
        return found + (self._sorted.lookup(tokens) if self._sorted is not None else [])

    def add(self, answer: Sequence[int]) -> None:
        """Add an answer and append it to the file, if possible."""
        row = np.array([*answer, SEPARATOR], dtype=np.int32)
        self._recent.add(answer)
        self._unsorted.append(row)
        if len(self._recent) > _UNSORTED:
            self._older = np.concatenate([self._older, *self._unsorted])
            self._sort()
        if self._file is not None:
            try:
                _append_own(self._file, row)
            except OSError:
                self._file = None


def answers_file(tokenizer: PreTrainedTokenizerBase, config: str) -> Path:
    """Return where past answers of a model with this tokenizer and configuration are kept."""
    return _folder() / f"answers-{_hashed(_tokenizer_state(tokenizer), config)}.i32"


def read_corpus(
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[Path],
    on_progress: Callable[[str, float], None] = lambda *_: None,
) -> SortedText:
    """Return the sorted text of files and folders; cached on disk until they change.

    Hidden files and folders, links, and files that are no UTF-8 text are left out.

    Args:
        tokenizer: of the model.
        paths: files or folders.
        on_progress: gets what is being done, and the fraction of it that is done.

    Raises:
        UsageProblem: a path is not there or cannot be read, or there is no text.
    """
    files = [file for path in paths for file in _files(path)]
    stats = [file.stat() for file in files]
    seen = [(str(file.resolve()), each.st_size, each.st_mtime_ns) for file, each in zip(files, stats, strict=True)]
    folder = _folder() / f"corpus-{_hashed(_tokenizer_state(tokenizer), repr(seen))}"
    kept = _read_kept(folder)
    if kept is not None:
        return kept
    tokens = _encoded(tokenizer, files, sum(each.st_size for each in stats), on_progress)
    if not len(tokens):
        raise UsageProblem(f"--corpus {', '.join(map(str, paths))}: no text in it")
    found = SortedText.of(tokens, lambda fraction: on_progress("sorting", fraction))
    _keep(found, folder)
    return found


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
            yield from (file for file in files if file.is_file() and not file.is_symlink())
    else:
        raise UsageProblem(f"--corpus {path}: no such file or folder")


def _encoded(
    tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], size: int, on_progress: Callable[[str, float], None]
) -> np.ndarray:
    """Return the token ids of all files; a few megabytes at a time, so that the tokenizer's threads all have work."""
    rows: list[np.ndarray] = []
    batch: list[str] = []
    waiting = done = 0
    for number, file in enumerate(files, start=1):
        text = _text(file)
        # one call takes as long as its longest text
        batch += [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
        waiting += len(text)
        if waiting > 4 * _CHUNK or number == len(files):
            encoded = tokenizer(batch, add_special_tokens=False)["input_ids"] if batch else ()
            rows += [np.array([*ids, SEPARATOR], dtype=np.int32) for ids in encoded]
            done, waiting, batch = done + waiting, 0, []
            on_progress("reading", min(1.0, done / max(1, size)))
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)


def _text(file: Path) -> str:
    with opening(f"--corpus {file}"):
        content = file.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text


def _folder() -> Path:
    """Return the cache folder of texts; it may be missing where none can be made."""
    folder = user_cache_path("space") / "text"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _hashed(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else repr(sorted(tokenizer.get_vocab().items()))


def _read_own(file: Path) -> np.ndarray:
    """Return what a file holds; nothing where it is not there, another user's, or open to others."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
            found = os.fstat(stream.fileno())
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
                return np.zeros(0, dtype=np.int32)
            data = stream.read()
    except OSError:
        return np.zeros(0, dtype=np.int32)
    tokens = np.frombuffer(data[: len(data) // 4 * 4], dtype=np.int32)
    return tokens if tokens.min(initial=0) >= SEPARATOR else tokens[:0]


def _append_own(file: Path, row: np.ndarray) -> None:
    """Add to a file that nobody else can read; one that has grown twice too long loses its beginning."""
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab") as stream:
        if os.fstat(stream.fileno()).st_uid != os.getuid():
            raise PermissionError(f"{file} is another user's")
        stream.write(row.tobytes())
        long = stream.tell() > 2 * row.itemsize * MAX_TOKENS
    if long:
        newest = _read_own(file)[-MAX_TOKENS:]
        file.unlink()
        _append_own(file, newest)


def _read_kept(folder: Path) -> SortedText | None:
    try:
        found = SortedText(*(np.load(folder / f"{part}.npy", mmap_mode="r") for part in _PARTS))
        os.utime(folder)
    except (OSError, ValueError):
        return None
    return found


def _keep(text: SortedText, folder: Path) -> None:
    """Write a sorted text to the cache; the least recently used ones are deleted."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for part in reversed(_PARTS):
            # nobody else's to read, as the files it was made of may be
            with open(os.open(folder / f"{part}.npy", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
                np.save(stream, getattr(text, part))
        kept = sorted(folder.parent.glob("corpus-*"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_KEPT_CORPORA]:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
    except OSError:  # read again the next time
        return

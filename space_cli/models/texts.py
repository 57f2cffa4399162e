"""Past answers of a model, to copy drafts from."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path
from transformers import PreTrainedTokenizerBase

from space_cli.core.drafting.corpus import SortedText
from space_cli.core.drafting.ngrams import SEPARATOR, Continuation, NgramIndex

MAX_TOKENS = 1 << 18
"""Tokens of past answers that are kept: about a megabyte of text, sorted in 20 ms."""
_UNSORTED = 1 << 15


class PastAnswers:
    """Past answers of a model, those of this process and, with a file, those before.

    The file holds int32 token ids and can be read by its owner alone.

    Args:
        file: None forgets everything with the process.
        vocabulary: number of token ids; a file with others is not ours.
    """

    def __init__(self, file: Path | None = None, *, vocabulary: int = 1 << 20) -> None:
        self._file = file
        older = np.zeros(0, dtype=np.int32) if file is None else _read_own(file)
        self._sort(older if older.max(initial=0) < vocabulary else older[:0])

    def _sort(self, tokens: np.ndarray) -> None:
        self._sorted, self._recent = SortedText.of(tokens[-MAX_TOKENS:]), NgramIndex()

    def lookup(self, tokens: Sequence[int]) -> list[Continuation]:
        """Return a few continuations of `tokens`, from newer and from older answers."""
        recent = [text._replace(is_context=False) for text in self._recent.lookup(tokens)]
        return recent + self._sorted.lookup(tokens)

    def add(self, answer: Sequence[int]) -> None:
        """Add an answer and append it to the file, if possible."""
        self._recent.add(answer)
        if len(self._recent.text) > _UNSORTED:
            self._sort(np.concatenate([self._sorted.tokens, np.array(self._recent.text, dtype=np.int32)]))
        if self._file is not None:
            try:
                _append_own(self._file, np.array([*answer, SEPARATOR], dtype=np.int32))
            except OSError:
                self._file = None


def answers_file(tokenizer: PreTrainedTokenizerBase, config: str) -> Path:
    """Return where past answers of a model with this tokenizer and configuration are kept."""
    return cache_folder() / f"answers-{hashed(tokenizer_state(tokenizer), config)}.i32"


def cache_folder() -> Path:
    """Return the cache folder of texts; it may be missing where none can be made."""
    folder = user_cache_path("space") / "text"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def hashed(*parts: str) -> str:
    """Return a name for what these parts make."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what decides the token ids of a text."""
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

"""Gives a model the texts it can copy from: the files of `--corpus`, and its past answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from space_cli.models.loading import LoadedModel


def with_corpora(loaded: LoadedModel, paths: Sequence[Path] | None, *, quiet: bool) -> LoadedModel:
    """Return the model with the texts of files and folders to copy from; shows a progress bar.

    Raises:
        UsageProblem: a path is not there, or there is no text in any.
    """
    if not paths:
        return loaded

    from space_cli.cli.console import note
    from space_cli.models.corpora import read_corpus

    with corpus_progress(quiet=quiet) as show:
        return replace(loaded, corpora=(read_corpus(loaded.tokenizer, paths, show, partial(note, quiet=quiet)),))


def with_past_answers(loaded: LoadedModel, *, kept: bool) -> LoadedModel:
    """Return the model with its past answers to copy from: those of this process, or those kept on disk."""
    from space_cli.core.engine import embedding_rows
    from space_cli.models.texts import PastAnswers, answers_file

    file = answers_file(loaded.tokenizer, loaded.model.config.to_json_string()) if kept else None
    return replace(loaded, past=PastAnswers(file, vocabulary=embedding_rows(loaded.model)))


@contextmanager
def corpus_progress(*, quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Show a bar meanwhile, if standard error is a terminal; yield what moves it."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from space_cli.cli.console import err

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True, disable=quiet or not err().is_terminal) as bar:
        task = bar.add_task("corpus: reading", total=1.0)
        yield lambda what, fraction: bar.update(task, description=f"corpus: {what}", completed=fraction)

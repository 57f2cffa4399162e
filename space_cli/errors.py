"""Errors a user can meet: one line that says what is wrong, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import ValidationError


class SpaceError(Exception):
    """A problem reported in one line; `exit_code` is what the process ends with."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the line: what is wrong, then what to do."""
        return f"{self.message.rstrip('.')}; {self.hint}" if self.hint else self.message


class UsageProblem(SpaceError):
    """Wrong use or bad input."""

    exit_code = 2


class ContextFull(UsageProblem):
    """What is asked does not fit the model's context."""


class RunFailed(SpaceError):
    """The run itself failed."""

    exit_code = 3


def system_reason(error: OSError) -> str:
    """Return what the system says of a file or an address, without the name."""
    return error.strerror or str(error)


@contextmanager
def opening(what: object) -> Iterator[None]:
    """Turn an OSError within into a `UsageProblem`; its line begins with `what`, as the user named it."""
    try:
        yield
    except OSError as error:
        raise UsageProblem(f"{what}: {system_reason(error)}") from error


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn an OSError within into a `RunFailed`: a result could not be written."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{file}: could not be written: {system_reason(error)}") from error


class Interrupted(SpaceError):
    """Ctrl-C."""

    exit_code = 130


def first_line(error: BaseException | str) -> str:
    """Return the first line of another library's error; where it has no text, the name of its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given" if isinstance(error, str) else type(error).__name__


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, otherwise: str) -> str:
    """Return a hint that names what looks like an unknown name, or `otherwise` where nothing does."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


class InvalidField(NamedTuple):
    """A field that pydantic refused: its dotted name ("" for the whole), the value, and the reason."""

    field: str
    value: object
    reason: str

    def __str__(self) -> str:
        """Return field and reason, as messages about a file name them."""
        return f"{self.field or 'the file'}: {self.reason}"


def first_invalid(error: ValidationError) -> InvalidField:
    """Return the first field that pydantic refused."""
    first = error.errors(include_url=False, include_context=False)[0]
    return InvalidField(".".join(map(str, first["loc"])), first["input"], first["msg"])

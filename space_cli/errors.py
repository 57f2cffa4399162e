"""Errors a user can meet: one line that says what is wrong, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class SpaceError(Exception):
    """A problem told in one line; `exit_code` is what the process ends with."""

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


class RunFailed(SpaceError):
    """The run itself failed."""

    exit_code = 3


def unwritten(file: Path, error: OSError) -> RunFailed:
    """Return the error of a result that found no place on disk."""
    return RunFailed(f"{file}: could not be written: {error.strerror or error}")


class Interrupted(SpaceError):
    """Ctrl-C."""

    exit_code = 130

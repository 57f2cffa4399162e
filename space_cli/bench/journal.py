"""The journal of a run: finished prompts are written to disk at once, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from space_cli.bench.record import Sample
from space_cli.errors import UsageProblem, opening, writing


class Journal:
    """A file of JSON lines beside the record: what the run is, then the samples of each finished prompt.

    Args:
        record: the file that the run will write in the end.
        run: all that makes two runs one: model, weights, methods, prompts, settings, versions, machine.

    Attributes:
        samples: found of a run cut short.
    """

    def __init__(self, record: Path, run: dict[str, Any]) -> None:
        self.file = journal_of(record)
        self.samples: list[Sample] = []
        self._run = json.loads(json.dumps(run))
        self._kept = 0

    def resume(self) -> None:
        """Read the finished prompts, if the file exists.

        Raises:
            UsageProblem: what is there is another run's, or no journal.
        """
        with opening(f"{self.file}: cannot be read"):
            content = self.file.read_bytes() if self.file.exists() else b""
        # a crash may have left half a line at the end: what is complete ends with a line break
        self._kept = content.rfind(b"\n") + 1
        try:
            run, *done = [json.loads(line) for line in content[: self._kept].splitlines()] or [self._run]
            self.samples = [Sample.model_validate(sample) for samples in done for sample in samples]
            differing = sorted(name for name in self._run if self._run[name] != run.get(name))
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageProblem(f"{self.file}: not what an interrupted run left", hint="delete it") from error
        if differing:
            raise UsageProblem(
                f"{self.file} is of a run with other {', '.join(differing)}",
                hint="give what that run was given, or delete the file to start over",
            )

    def __enter__(self) -> Journal:
        """Open the file for appending after its last complete line."""
        with writing(self.file):
            self._stream = self.file.open("ab")
            self._stream.truncate(self._kept)
            if not self._kept:
                self._write(self._run)
        return self

    def add(self, samples: Sequence[Sample]) -> None:
        """Append the samples of a finished prompt.

        Raises:
            RunFailed: they could not be written.
        """
        with writing(self.file):
            self._write([sample.model_dump() for sample in samples])

    def _write(self, value: object) -> None:
        self._stream.write(json.dumps(value).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; it stays until `finish`."""
        self._stream.close()

    def finish(self) -> None:
        """Remove the file: the record has everything."""
        self.file.unlink(missing_ok=True)


def journal_of(record: Path) -> Path:
    """Return the path of a record's journal."""
    return record.with_name(f"{record.name}.partial")

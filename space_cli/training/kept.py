"""Rows kept on disk as they come, so that a run that was cut short goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from space_cli.errors import writing


def kept_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that earlier runs kept; an incomplete line is left out."""
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def keep(file: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file of JSON lines.

    Raises:
        RunFailed: it cannot be written.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            # an incomplete last line of an earlier run must not swallow this row
            stream.write("\n" + json.dumps(row) + "\n")

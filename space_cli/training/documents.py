"""Plain text as training data: files of concatenated documents."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from space_cli.rows import SourceRow, reading
from space_cli.text import prose

SUFFIXES = (".txt", ".txt.gz")
_MARK = "<|endoftext|>"
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+(?=\S)")


def read_documents(file: Path) -> tuple[list[SourceRow], str]:
    """Return the documents of a text file as rows with one field `text`, and the separator found.

    Raises:
        UsageProblem: the file cannot be read, or is no text.
    """
    with reading(file):
        content = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
    text = prose(content, str(file)).replace("\r\n", "\n")
    mark, how = (re.compile(re.escape(_MARK)), _MARK) if _MARK in text else (_BLANK_LINES, "blank lines")
    rows, start, line = [], 0, 1
    for end, behind in [*((found.start(), found.end()) for found in mark.finditer(text)), (len(text), len(text))]:
        document = text[start:end].strip("\n")
        if document.strip():
            lead = len(text[start:end]) - len(text[start:end].lstrip("\n"))
            rows.append(SourceRow(str(file), "line", line + lead, {"text": document}))
        line += text.count("\n", start, behind)
        start = behind
    return rows, how

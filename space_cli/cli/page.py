"""Reports to read and to send: one Markdown text, written as it is or as a page that needs no network."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from space_cli.cli.console import visible
from space_cli.errors import RunFailed
from space_cli.files import write_whole

if TYPE_CHECKING:
    from space_cli.verify.record import Divergence, Verification

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8886; text-align: left; }
pre { padding: .75rem; background: #8882; overflow-x: auto; }
"""


_LEGEND = "Tie: rounding errors as measured at that place explain either token. Violation: they do not."


def write_page(file: Path, markdown: str) -> None:
    """Write a report, whole or not at all: Markdown, or HTML where the file's name ends so.

    Raises:
        RunFailed: the file cannot be written.
    """
    try:
        write_whole(file, markdown if file.suffix == ".md" else _page(markdown))
    except OSError as error:
        raise RunFailed(f"{file}: could not be written: {error.strerror or error}") from error


def _page(markdown: str) -> str:
    from markdown_it import MarkdownIt

    # html off: what a model wrote stays text
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    title = html.escape(markdown.splitlines()[0].lstrip("# "))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(str(cell)) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """Return untrusted text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", visible(text))


def fenced(text: str) -> str:
    """Return untrusted text as a code block that it cannot close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{visible(text)}\n{fence}"


def verification_page(record: Verification) -> str:
    """Return a verification as Markdown."""
    from space_cli.cli.tables import by_place, evidence, verdict, verification_settings

    where = record.environment
    rows = [(row.suite, row.against, row.answers, row.identical, row.ties, row.violations) for row in record.rows]
    parts = [
        f"# {escaped(verdict(record))}",
        "" if record.complete else "The run was cut short; this is what was done by then.",
        escaped(" · ".join(verification_settings(record))),
        table(("suite", "against", "answers", "identical", "ties", "violations"), rows),
        *[escaped(line) for line in evidence(record)],
        _LEGEND,
        *[_place(place) for place in by_place(record.divergences)],
        escaped(
            f"space {where['space']} ({where['commit'] or 'no checkout'}), torch {where['torch']}, transformers"
            f" {where['transformers']}, {where['processor']}, {where['date']}"
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _place(place: list[Divergence]) -> str:
    from space_cli.cli.tables import heading

    found = place[0]
    sides = table(
        ("", "token id", "text"),
        [
            ("expected", _shown(found.expected), repr(found.expected_text)),
            ("got", _shown(found.got), repr(found.got_text)),
        ],
    )
    return "\n\n".join(
        [f"## {_cell(f'{found.verdict}: {heading(place)}')}", fenced(found.context), sides, escaped(found.reason)]
    )


def _shown(token: int | None) -> str:
    return "ended" if token is None else str(token)

"""Reports to read and to send: one text, written as Markdown or as a page that needs no network and no script.

What a model wrote or a file holds comes in through `escaped`, `code` and `fenced` alone. See `bench_page` and
`verify_page` for what the reports say, `page.css` for how they look.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from space_cli.cli.console import visible
from space_cli.errors import unwritten
from space_cli.files import atomic_write

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style></head>
<body><main>
"""


class Code(str):
    """A code span in Markdown: a table takes it as it is, where other text is escaped."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Html:
    """What only a page can show; it is left out of Markdown."""

    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that a page sets together, in an element of this class."""

    kind: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Folded:
    """Parts behind a line of plain text that opens them."""

    summary: str
    parts: Sequence[Part]


Part = str | Html | Group | Folded
"""Of a report; a `str` is Markdown."""


def write_page(file: Path, title: str, parts: Sequence[Part]) -> None:
    """Write a report, whole or not at all: Markdown, or HTML where the file's name ends so.

    Args:
        file: its name ends with .md or .html.
        title: of the page, plain text; the heading is the first part.
        parts: in order.

    Raises:
        RunFailed: the file cannot be written.
    """
    try:
        atomic_write(file, as_markdown(parts) if file.suffix == ".md" else as_html(title, parts))
    except OSError as error:
        raise unwritten(file, error) from error


def as_markdown(parts: Sequence[Part]) -> str:
    """Return a report as GitHub shows it."""
    return "\n\n".join(text for part in parts if (text := _markdown(part))) + "\n"


def as_html(title: str, parts: Sequence[Part]) -> str:
    """Return a report as a page."""
    head = _HEAD.format(
        policy=_POLICY,
        title=html.escape(visible(title)),
        style=Path(__file__).with_name("page.css").read_text("utf-8"),
    )
    renderer = _renderer()
    return head + "".join(_html(part, renderer) for part in parts) + "</main></body></html>\n"


def _markdown(part: Part) -> str:
    if isinstance(part, Html):
        return ""
    if isinstance(part, Group):
        return as_markdown(part.parts).strip("\n")
    if isinstance(part, Folded):
        summary = html.escape(visible(part.summary))
        return f"<details>\n<summary>{summary}</summary>\n\n{as_markdown(part.parts)}\n</details>"
    return part


def _html(part: Part, renderer: MarkdownIt) -> str:
    if isinstance(part, Html):
        return part.text
    if isinstance(part, str):
        return str(renderer.render(part))
    inner = "".join(_html(each, renderer) for each in part.parts)
    if isinstance(part, Group):
        return f'<div class="{part.kind}">\n{inner}</div>\n'
    return f"<details><summary>{html.escape(visible(part.summary))}</summary>\n{inner}</details>\n"


def _renderer() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # html off: what a model wrote stays text
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    # a wide table scrolls by itself, by keys too
    renderer.add_render_rule("table_open", lambda *_: '<div class="table" tabindex="0"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return renderer


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, figures: bool = False) -> str:
    """Return a Markdown table; with figures, all columns but the first are set to the right."""
    rule = ["---", *["--:" if figures else "---"] * (len(headings) - 1)]
    lines = [_line(headings), "| " + " | ".join(rule) + " |", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(cell: object) -> str:
    return cell.replace("|", "\\|") if isinstance(cell, Code) else _inline(str(cell))


def escaped(text: str) -> str:
    """Return untrusted text as one line of Markdown that shows it as it is."""
    # at the beginning of a line these make lists, rules and headings
    return re.sub(r"^(\d*)([-=]|\.(?= |$))", r"\1\\\2", _inline(text))


def _inline(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", visible(" ".join(text.split())))


def code(text: str) -> Code:
    """Return an untrusted name as a code span, in which GitHub makes no links and mentions either."""
    shown = visible(" ".join(text.split())) or " "
    fence = "`" * (_longest_run(shown) + 1)
    # a space beside a backtick belongs to the fence
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return Code(f"{fence}{pad}{shown}{pad}{fence}")


def fenced(text: str) -> str:
    """Return untrusted text as a code block that it cannot close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}\n{visible(text)}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)

"""Reports: one text, written as Markdown or as a self-contained HTML page without scripts.

What a model wrote or a file holds comes in through `escaped`, `code` and `fenced` alone. See `bench_page` and
`verify_page` for what the reports say, `templates/` for how they look as a page.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from space_cli.errors import writing
from space_cli.files import atomic_write
from space_cli.text import visible

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Code(str):
    """A code span in Markdown: a table takes it as it is, where other text is escaped."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Html:
    """What only a page can show, by a template of ours with values; it is left out of Markdown."""

    template: str
    values: Mapping[str, Any]


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
    """Write a report atomically: Markdown, or HTML if the file's name ends in .html.

    Args:
        file: its name ends with .md or .html.
        title: of the page, plain text; the heading is the first part.
        parts: in order.

    Raises:
        RunFailed: the file cannot be written.
    """
    with writing(file):
        atomic_write(file, as_markdown(parts) if file.suffix == ".md" else as_html(title, parts))


def as_markdown(parts: Sequence[Part]) -> str:
    """Return a report as GitHub shows it."""
    return "\n\n".join(text for part in parts if (text := _markdown(part))) + "\n"


def as_html(title: str, parts: Sequence[Part]) -> str:
    """Return a report as a page.

    Whatever the templates put in is made visible and then escaped, unless it is the outcome of the Markdown renderer or
    marked as safe.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("space_cli.report"),
        autoescape=True,
        trim_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
    )
    renderer = _renderer()
    environment.filters["markdown"] = renderer.render
    return environment.get_template("page.html").render(policy=_POLICY, title=title, parts=parts)


def _markdown(part: Part) -> str:
    if isinstance(part, Html):
        return ""
    if isinstance(part, Group):
        return as_markdown(part.parts).strip("\n")
    if isinstance(part, Folded):
        summary = html.escape(visible(part.summary))
        return f"<details>\n<summary>{summary}</summary>\n\n{as_markdown(part.parts)}\n</details>"
    return part


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

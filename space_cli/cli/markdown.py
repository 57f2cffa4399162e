"""Styles of Markdown laid over an answer, every character of it left in its place.

Set as Markdown, a diff would lose its signs and `a * b * c` its stars; what was shown while it came must be there to
copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.syntax import Syntax
from rich.text import Span, Text

_FENCED = re.compile(r"^([ \t]*)(`{3,})[ \t]*([\w+#.-]*)[^\n`]*\n(.*?)(?:^\1\2`*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
# `# comment` and `2**n` occur in code too, so they do not count as Markdown
_HEADING = re.compile(r"^#{2,4} \S[^\n]*$", re.MULTILINE)
_BOLD = re.compile(r"(?<!\w)\*\*\w([^*\n]*[\w.!?:])?\*\*(?!\w)")
_CODE = re.compile(r"(?<!`)`[^`\n]+`(?!`)")
_THEME = "ansi_dark"  # the terminal's own colours


def styled(text: Text) -> Text:
    """Return the text with headings and bold words bold, code of fences coloured; its characters are the same."""
    shown, end = text.copy(), 0
    for fence in _FENCED.finditer(text.plain):
        _style_prose(shown, end, fence.start())
        for span in _highlighted(fence[4], fence[3]):
            shown.stylize(span.style, fence.start(4) + span.start, min(fence.start(4) + span.end, fence.end(4)))
        end = fence.end()
    _style_prose(shown, end, len(text.plain))
    return shown


def _style_prose(text: Text, start: int, end: int) -> None:
    for pattern, style in ((_HEADING, "bold"), (_BOLD, "bold"), (_CODE, "italic")):
        for found in pattern.finditer(text.plain, start, end):
            text.stylize(style, found.start(), found.end())


def _highlighted(code: str, language: str) -> Iterator[Span]:
    drawn = Syntax("", language or "text", theme=_THEME).highlight(code)
    # if the highlighter changes a character, its positions no longer match the code
    return iter(drawn.spans if drawn.plain.rstrip("\n") == code.rstrip("\n") else ())

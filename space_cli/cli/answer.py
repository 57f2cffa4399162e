"""How an answer looks while it comes and once it is there."""

from __future__ import annotations

import re
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from space_cli.cli.console import plain, visible
from space_cli.cli.live import Tally, histogram, newest_lines, tally_of

if TYPE_CHECKING:
    from space_cli.cli.session import Session
    from space_cli.core.stream import Generation, Step

_SECONDS_PER_FRAME = 0.08
_SHADES = ("green", "cyan")
_COLOURLESS_SHADES = ("underline", "bold")
_MARKDOWN = re.compile(r"^(```|#{1,4} \S|[-*] \S|\d+\. \S|> )|\*\*\S", re.MULTILINE)


class PlainAnswer:
    """Text as it comes on standard output, without a control character of ours."""

    def __init__(self, session: Session) -> None:
        from space_cli.core.stopping import TextStream

        self._stream = TextStream(partial(session.loaded.decode, skip_special_tokens=True))

    def __enter__(self) -> PlainAnswer:
        """Start."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the last line."""
        self._write(self._stream.flush() + "\n")

    def step(self, step: Step) -> None:
        """Write the text that a step has made final."""
        self._write("".join(map(self._stream.push, step.tokens)))

    def _write(self, text: str) -> None:
        sys.stdout.write(visible(text))
        sys.stdout.flush()


class LiveAnswer(PlainAnswer):
    """Draws the newest lines while they come, tokens of one step shaded alike, and leaves the whole answer behind."""

    def __init__(self, session: Session, console: Console) -> None:
        super().__init__(session)
        self._console = console
        self._shades = _COLOURLESS_SHADES if console.no_color or not console.color_system else _SHADES
        self._text = Text()
        self._tally = Tally()
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True, get_renderable=self._render)

    def __enter__(self) -> LiveAnswer:
        """Start drawing."""
        self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the answer; what reads as Markdown is set as such."""
        self._text.append_text(plain(self._stream.flush()))
        self._live.stop()
        if _MARKDOWN.search(self._text.plain):
            self._console.print(Markdown(self._text.plain, hyperlinks=False))
        else:
            self._console.print(self._text, soft_wrap=True)

    def step(self, step: Step) -> None:
        """Add a step's text, shaded where it brought several tokens."""
        self._tally.add(step)
        style = self._shades[self._tally.steps % 2] if len(step.tokens) > 1 else ""
        self._text.append_text(plain("".join(map(self._stream.push, step.tokens)), style=style))
        if time.monotonic() - self._drawn >= _SECONDS_PER_FRAME:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _render(self) -> Group:
        size = self._console.size
        newest = newest_lines(self._text, self._console, max(1, size.width - 1), max(1, size.height - 3))
        counted = f"{self._tally.tokens} tokens in {self._tally.steps} steps"
        return Group(newest, Text(counted, style="dim", no_wrap=True))


class StepsAnswer(PlainAnswer):
    """One line a step: what was proposed, how much of it was right, and the model's own token behind it."""

    def __init__(self, session: Session, console: Console) -> None:
        super().__init__(session)
        self._console = console
        self._decode = session.loaded.decode
        self._number = 0

    def __enter__(self) -> StepsAnswer:
        """Explain the lines."""
        legend = (
            "each step checks the guesses of the one before:  + right, kept   - wrong, replaced   > the model's own"
        )
        self._console.print(Text(legend, style="dim"), soft_wrap=True)
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is left to do: the lines are the answer."""

    def step(self, step: Step) -> None:
        """Print the step."""
        self._number += 1
        line = Text(f"{self._number:>4}  ", style="dim")
        own = step.tokens[step.accepted :]
        for token in step.tokens[: step.accepted]:
            line.append_text(Text.assemble("+", (self._shown(token), "green"), " "))
        # what stood behind a wrong guess was never looked at
        for wrong in step.rejected if own else ():
            line.append_text(Text.assemble("-", (self._shown(wrong), "red strike"), " "))
        for token in own:
            line.append_text(Text.assemble(">", (self._shown(token), "bold"), " "))
        self._console.print(line, soft_wrap=True)

    def _shown(self, token: int) -> str:
        text = visible(self._decode([token])).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
        return text.replace("\t", "\N{RIGHTWARDS ARROW}").replace(" ", "\N{MIDDLE DOT}")


def view_of(session: Session, console: Console) -> PlainAnswer:
    """Return the view for the settings and for where the answer goes."""
    if session.settings.live == "steps":
        return StepsAnswer(session, console)
    return LiveAnswer(session, console) if console.is_terminal else PlainAnswer(session)


def summary(generation: Generation, *, speedup: float | None, context: str) -> str:
    """Return the line below an answer."""
    tally = tally_of([generation])
    per_step = f"{tally.tokens} tokens in {tally.steps} steps: {tally.tokens / tally.steps:.2f} per step"
    parts = [f"{per_step}  {histogram(tally.accepted)}", f"{tally.rate:.0f} tokens/s"]
    if speedup is not None:
        parts.append(f"{speedup:.2f} times as fast as one token at a time")
    if context:
        parts.append(context)
    return " · ".join(parts)

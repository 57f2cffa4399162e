"""Views of an answer, while it is generated and when it is complete."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from space_cli.cli.console import is_screen, plain, print_wrapped
from space_cli.cli.live import Frames, Tally, newest_lines, tally_of
from space_cli.cli.markdown import styled
from space_cli.report.wording import named_histogram, without_masks
from space_cli.text import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from space_cli.chat.session import Session
    from space_cli.core.stream import Generation, Step

# a blue and a purple of medium lightness, readable on white and on black
_SHADES = ("color(32)", "color(133)")
# of 16 colours the nearest to that purple is white
_BASIC_SHADES = ("cyan", "magenta")
_COLOURLESS_SHADES = ("underline", "bold")


def shades_of(console: Console) -> tuple[str, str]:
    """Return the two styles that alternate from step to step."""
    if console.no_color or not console.color_system:
        return _COLOURLESS_SHADES
    return _SHADES if console.color_system in ("256", "truecolor") else _BASIC_SHADES


class ShadedText:
    """The final part of an answer's text; the tokens of a multi-token step share a shade."""

    def __init__(self, session: Session, console: Console, prompt_ids: Sequence[int]) -> None:
        from space_cli.core.stopping import TextStream

        self._stream = TextStream(partial(session.loaded.decode, skip_special_tokens=True), prompt_ids)
        self._shades = shades_of(console)
        self._steps = 0
        self.text = Text()

    def add(self, step: Step) -> None:
        """Add the text that a step has made final."""
        self._steps += 1
        style = self._shades[self._steps % 2] if len(step.tokens) > 1 else ""
        self.text.append_text(plain("".join(map(self._stream.push, step.tokens)), style=style))

    def finish(self) -> None:
        """Add the text held back so far; drop empty lines at the end."""
        self.text.append_text(plain(self._stream.flush()))
        self.text.rstrip()


class PlainAnswer:
    """Streams text to standard output without control characters of ours."""

    def __init__(self, session: Session, prompt_ids: Sequence[int]) -> None:
        from space_cli.core.stopping import TextStream

        self._stream = TextStream(partial(session.loaded.decode, skip_special_tokens=True), prompt_ids)

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
    """Draws the newest lines while the answer is generated, shaded by step, then prints the whole answer."""

    def __init__(self, session: Session, console: Console, prompt_ids: Sequence[int]) -> None:
        super().__init__(session, prompt_ids)
        self._console = console
        self._shaded = ShadedText(session, console, prompt_ids)
        self._tally = Tally()
        self._frames = Frames(console, self._render, transient=True)

    def __enter__(self) -> LiveAnswer:
        """Start drawing."""
        self._frames.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the answer, as it came."""
        self._shaded.finish()
        self._frames.stop()
        self._console.print(styled(self._shaded.text), soft_wrap=True)

    def step(self, step: Step) -> None:
        """Add a step's text."""
        self._tally.add(step)
        self._shaded.add(step)
        self._frames.refresh_if_due()

    def _render(self) -> Group:
        size, so_far = self._console.size, self._tally
        newest = newest_lines(self._shaded.text, max(1, size.width - 1), max(1, size.height - 3))
        status = f"{counted(so_far)} · {so_far.rate:.0f} tokens/s" if so_far.steps else "reading the prompt"
        return Group(newest, Text(status, style="dim", no_wrap=True, overflow="ellipsis"))


class StepsAnswer(PlainAnswer):
    """Prints one line per model call: candidates checked, which were accepted, and the model's own token."""

    def __init__(self, session: Session, console: Console, prompt_ids: Sequence[int]) -> None:
        super().__init__(session, prompt_ids)
        self._console = console
        self._decode = session.loaded.decode
        self._number = 0

    def __enter__(self) -> StepsAnswer:
        """Explain the lines."""
        print_wrapped(
            self._console,
            Text(
                "One line is one model call. It checks tokens guessed before (right/guessed) and adds one of its own:"
                " what is right comes out with it, in the same call.",
                style="dim",
            ),
        )
        key = ("  + right, kept", ("  - wrong, dropped", "dim"), "  > the model's own")
        print_wrapped(self._console, Text.assemble(*key))
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is left to do: the lines are the answer."""

    def step(self, step: Step) -> None:
        """Print the step."""
        self._number += 1
        checked = f"{step.accepted}/{len(step.candidates)}" if step.candidates else ""
        own = step.tokens[step.accepted :]
        tokens = [Text.assemble("+", (self._shown(token), "green")) for token in step.tokens[: step.accepted]]
        # candidates after a rejected one were never checked
        wrong = dict.fromkeys(step.rejected) if own else ()
        tokens += [Text.assemble("-", (self._shown(token), "red strike")) for token in wrong]
        tokens += [Text.assemble(">", (self._shown(token), "bold")) for token in own]
        row = Table.grid(padding=(0, 1))
        row.add_column(width=4, justify="right", style="dim")
        row.add_column(width=5, justify="right", style="dim")
        row.add_column(overflow="fold")
        row.add_row(str(self._number), checked, Text(" ").join(tokens))
        self._console.print(row)

    def _shown(self, token: int) -> str:
        text = visible(self._decode([token])).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
        return text.replace("\t", "\N{RIGHTWARDS ARROW}").replace(" ", "\N{MIDDLE DOT}")


def greeting(session: Session, console: Console) -> Text:
    """Return the introduction of a chat: what a model call does, in the shades used later."""
    if session.settings.mode == "ar":
        return Text("Each model call yields one token.", style="dim")
    one, other = shades_of(console)
    loaded = session.loaded
    introduction = Text.assemble(
        ("Each model call checks tokens guessed by the calls before it and adds one of its own: ", "dim"),
        ("what comes out of one call", one),
        (" ", "dim"),
        ("is shaded alike", other),
        (". Fewer calls, the same text.", "dim"),
    )
    facts = {"model": loaded.name, "source": loaded.source, "masks_per_group": loaded.masks_per_group}
    for line in without_masks(facts):
        introduction.append_text(plain(f"\n{line}", style="dim"))
    return introduction


def view_of(session: Session, console: Console, prompt_ids: Sequence[int]) -> PlainAnswer:
    """Return the view for the settings and for where the answer to a prompt goes."""
    if session.settings.live == "steps":
        return StepsAnswer(session, console, prompt_ids)
    return LiveAnswer(session, console, prompt_ids) if is_screen(console) else PlainAnswer(session, prompt_ids)


def summary(session: Session, generation: Generation, *, speedup: float | None, context: str) -> str:
    """Return the lines below an answer: tokens, model calls and speed, and for SPACE the tokens per call."""
    tally = tally_of([generation])
    parts = [counted(tally), f"{tally.rate:.0f} tokens/s"]
    if speedup is not None:
        parts.append(f"{speedup:.2f} times as fast as one token at a time")
    if context:
        parts.append(context)
    line = " · ".join(parts)
    if tally.tokens > tally.steps:
        return f"{line}\ntokens per call: {named_histogram(tally.accepted)}"
    if session.settings.mode == "ar":
        return line
    is_guessed = any(step.candidates for step in generation.steps)
    return f"{line}\n{'no guess was right' if is_guessed else 'drafting was not expected to pay'}"


def counted(tally: Tally) -> str:
    """Return tokens, model calls and tokens per call as text."""
    return f"{tally.tokens} tokens in {tally.steps} model calls, {tally.tokens / tally.steps:.2f} per call"

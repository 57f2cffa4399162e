"""Views of a run of `space bench` or `space verify-lossless`."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Self

from rich.cells import chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from space_cli.cli.console import err, is_screen, plain, table
from space_cli.report.wording import histogram
from space_cli.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import RenderableType

    from space_cli.core.stopping import TextStream
    from space_cli.core.stream import Generation, Step
    from space_cli.models.loading import LoadedModel

COMPILING = "compiling it for this machine, once: about 90 s for smollm2 on two cores (--engine eager does without)"
EAGER = "the eager engine runs, which is slower"
_SECONDS_PER_FRAME = 0.1
_TEXT_LINES = 9


@dataclass
class Tally:
    """Running totals of steps."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    accepted: Counter[int] = field(default_factory=Counter)

    def add(self, step: Step) -> None:
        """Count a step."""
        self.tokens += len(step.tokens)
        self.steps += 1
        self.seconds += step.seconds
        self.accepted[len(step.tokens)] += 1

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Frames(Live):
    """A drawing that is redrawn between steps, at most ten times a second."""

    def __init__(self, console: Console, draw: Callable[[], RenderableType], *, transient: bool) -> None:
        super().__init__(console=console, auto_refresh=False, transient=transient, get_renderable=draw)
        self._drawn = 0.0

    def refresh_if_due(self) -> None:
        """Redraw, unless that was done a moment ago."""
        if time.monotonic() - self._drawn >= _SECONDS_PER_FRAME:
            self.refresh()
            self._drawn = time.monotonic()


class View:
    """Plain lines on standard error about a run; a live view draws while it is entered, too."""

    _frames: Frames | None = None

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console, self._quiet = console, quiet

    def note(self, text: str) -> None:
        """Say what is going on."""
        if not self._quiet:
            self._console.print(plain(text), soft_wrap=True)

    def loading(self, name: str) -> None:
        """Say that a model is being loaded."""
        self.note(f"loading {name}")

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._frames is not None:
            self._frames.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing."""
        if self._frames is not None:
            self._frames.stop()


class RunView(View):
    """Plain lines, one per prompt group; `LiveRunView` draws instead."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        super().__init__(console, quiet=quiet)
        self._tallies: dict[str, Tally] = {}
        self._prompts = self._total = 0
        self._last_line = time.monotonic()

    @property
    def done(self) -> str:
        """How far the run got."""
        return f"{self._prompts} of {self._total} {self._unit}"

    def compiling(self) -> None:
        """Say that a model is being compiled, which takes its time."""
        self.note(COMPILING)

    def eager(self, reason: str) -> None:
        """Say why a model runs eager that would be faster compiled."""
        self.note(f"{EAGER}: {reason}")

    def left_out(self, reasons: dict[str, str]) -> None:
        """Say what is not done, and why."""
        for what, why in reasons.items():
            self.note(f"left out: {what}: {why}")

    def begin(self, loaded: LoadedModel, methods: list[str], total: int, *, unit: str = "prompts") -> None:
        """Take what the run is about: how many prompts or answers are to be done by all methods, the last one last."""
        self._loaded = loaded
        self._unit = unit
        self._tallies = {name: Tally() for name in methods}
        self._total = total
        self._last_line = time.monotonic()  # loading before this point needs no line

    def started(self, suite: str, task_id: str, method: str) -> None:
        """An answer begins."""

    def stepped(self, method: str, step: Step) -> None:
        """A model call has ended."""
        self._tallies[method].add(step)

    def finished(self, method: str) -> None:
        """Count the prompt when it is done by all methods."""
        if method == next(reversed(self._tallies)):
            self._prompts += 1
            self._prompt_done()

    def _prompt_done(self) -> None:
        """Print a line, at most every five seconds and at the end."""
        if self._quiet or (self._prompts < self._total and time.monotonic() - self._last_line < 5):
            return
        self._last_line = time.monotonic()
        rates = "  ".join(f"{name} {tally.rate:.0f} tok/s" for name, tally in self._tallies.items())
        self._console.print(plain(f"{self._prompts}/{self._total} {self._unit}  {rates}"), soft_wrap=True)


class LiveRunView(RunView):
    """Draws progress, the current text and the tokens per step; redraws between steps, at most 8 times a second."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, quiet=False)
        self._text = Text()
        self._task = self._method = ""
        self._stream: TextStream | None = None
        self._bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}", markup=False),
            BarColumn(bar_width=max(10, min(40, console.width - 50)), complete_style="green"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[model]}", "dim", markup=False, table_column=Column(no_wrap=True, ratio=1)),
            console=console,
            expand=True,
        )
        self._bar_task = self._bar.add_task("", start=False, total=1, model="")
        self._frames: Frames = Frames(console, self._render, transient=True)

    def begin(self, loaded: LoadedModel, methods: list[str], total: int, *, unit: str = "prompts") -> None:
        """Take what the run is about, for the bar too."""
        super().begin(loaded, methods, total, unit=unit)
        model = f"{visible(loaded.name)} {loaded.dtype} {loaded.device}"
        self._bar.update(self._bar_task, description=unit, total=total, model=model)
        self._bar.start_task(self._bar_task)

    def started(self, suite: str, task_id: str, method: str) -> None:
        """Clear the text for a new answer."""
        from space_cli.core.stopping import TextStream

        self._task, self._method, self._text = f"{suite} {task_id}", method, Text()
        self._stream = TextStream(self._loaded.decode)

    def stepped(self, method: str, step: Step) -> None:
        """Add the step's tokens, shaded alike."""
        super().stepped(method, step)
        assert self._stream is not None
        piece = "".join(self._stream.push(token) for token in step.tokens)
        shade = "bold" if len(step.tokens) > 1 and self._tallies[method].steps % 2 else ""
        self._text.append_text(plain(piece, style="green " + shade if len(step.tokens) > 1 else ""))
        self._frames.refresh_if_due()

    def _prompt_done(self) -> None:
        """Move the bar instead of printing a line."""
        self._bar.update(self._bar_task, completed=self._prompts)

    def _render(self) -> Group:
        size = self._console.size
        height = min(_TEXT_LINES, max(1, size.height - len(self._tallies) - 6))
        body = newest_lines(self._text, size.width - 4, height)
        title = plain(f"{self._method}  {self._task}")
        panel = Panel(body, title=title, title_align="left", height=height + 2)
        return Group(self._bar, panel, self._methods())

    def _methods(self) -> Table:
        shown = table("method", "tok/s", "tok/step")
        shown.add_column("tokens by step: 1, 2, 3, ...", no_wrap=True)
        for name, tally in self._tallies.items():
            per_step = tally.tokens / tally.steps if tally.steps else 0.0
            style = "bold" if name == self._method else ""
            shown.add_row(name, f"{tally.rate:.0f}", f"{per_step:.2f}", histogram(tally.accepted), style=style)
        return shown


def run_view(*, quiet: bool) -> RunView:
    """Return the view for where standard error goes."""
    console = err()
    if quiet or not is_screen(console):
        return RunView(console, quiet=quiet)
    return LiveRunView(console)


def newest_lines(text: Text, width: int, height: int) -> Text:
    """Return the end of a text: what is new stays in sight where a line is longer than the place is wide.

    Lines are broken where they are full, as a terminal does: code has its own idea of where a line begins.
    """
    lines = text.split("\n", allow_blank=True)[-height:]
    wrapped = [part for line in lines for part in _broken(line, width)]
    return Text("\n", no_wrap=True).join(wrapped[-height:])


def _broken(line: Text, width: int) -> Iterable[Text]:
    line.expand_tabs(8)
    parts = chop_cells(line.plain, width)
    return line.divide(list(accumulate(map(len, parts)))[:-1])


def tally_of(generations: Iterable[Generation]) -> Tally:
    """Return the totals of several answers' steps."""
    tally = Tally()
    for generation in generations:
        for step in generation.steps:
            tally.add(step)
    return tally

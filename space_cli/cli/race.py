"""`/race`: the same answer by AR and by SPACE in two panes, each at its own pace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from space_cli.cli.console import plain
from space_cli.core.block import AR_BLOCK
from space_cli.core.cache import KVCache
from space_cli.core.stopping import TextStream
from space_cli.core.stream import Generation

if TYPE_CHECKING:
    from space_cli.cli.session import Session
    from space_cli.core.stream import Step
    from space_cli.models.prompting import Known

_SECONDS_PER_FRAME = 0.1


@dataclass
class _Runner:
    name: str
    steps: Iterator[Step]
    stream: TextStream
    generation: Generation = field(default_factory=Generation)
    text: str = ""
    is_done: bool = False

    def advance(self) -> None:
        """Take a step."""
        step = next(self.steps)
        self.generation.steps.append(step)
        self.text += "".join(map(self.stream.push, step.tokens))
        self.is_done = step.finish_reason is not None
        if self.is_done:
            self.text += self.stream.flush()

    @property
    def told(self) -> str:
        tokens, steps, seconds = len(self.generation.tokens), len(self.generation.steps), self.generation.seconds
        rate = tokens / seconds if seconds else 0
        return f"{self.name}  {rate:.0f} tok/s  {seconds:.1f} s  {tokens} tokens  {steps} steps"


def race(session: Session, asked: Known, console: Console) -> None:
    """Answer a request both ways; whose own clock is behind takes the next step, so the panes keep their real pace."""
    shapes = {"one token at a time": AR_BLOCK, "SPACE": session.shape("space")}
    runners = []
    for name, block in shapes.items():
        # both begin with nothing computed
        steps = session.steps(asked, block=block, cache=KVCache())
        stream = TextStream(partial(session.loaded.decode, skip_special_tokens=True))
        runners.append(_Runner(name, steps, stream))
    ar, space = runners
    drawn = 0.0
    with Live(console=console, auto_refresh=False, get_renderable=lambda: _panes(runners, console)) as live:
        while not all(runner.is_done for runner in runners):
            min(
                (runner for runner in runners if not runner.is_done), key=lambda each: each.generation.seconds
            ).advance()
            if time.monotonic() - drawn >= _SECONDS_PER_FRAME:
                live.refresh()
                drawn = time.monotonic()
        live.refresh()
    same = (
        "the same tokens"
        if ar.generation.tokens == space.generation.tokens
        else "other tokens: they part at a near tie"
    )
    console.print(Text(f"{ar.generation.seconds / space.generation.seconds:.2f} times as fast, {same}", style="dim"))


def _panes(runners: list[_Runner], console: Console) -> Columns:
    size = console.size
    width = max(20, size.width // 2 - 1) if size.width >= 60 else size.width
    height = max(4, min(16, size.height - 4 if size.width >= 60 else size.height // 2 - 2))
    panes = []
    for runner in runners:
        lines = plain(runner.text).split("\n", allow_blank=True)[-height:]
        wrapped = [part for line in lines for part in line.wrap(console, width - 4, overflow="fold")]
        body = Text("\n", no_wrap=True).join(wrapped[-(height - 2) :])
        done = "green" if runner.is_done else "dim"
        panes.append(Panel(body, title=runner.told, title_align="left", width=width, height=height, border_style=done))
    return Columns(panes, padding=(0, 0))

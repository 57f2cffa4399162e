"""`/race`: the same answer by AR and by SPACE in two panes, each at its own pace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from space_cli.cli.console import plain
from space_cli.cli.live import Tally, newest_lines
from space_cli.core.cache import KVCache
from space_cli.core.stopping import TextStream

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
    tally: Tally = field(default_factory=Tally)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    is_done: bool = False

    def advance(self) -> None:
        """Take a step."""
        step = next(self.steps)
        self.tally.add(step)
        self.token_ids += step.tokens
        self.text += "".join(map(self.stream.push, step.tokens))
        self.is_done = step.finish_reason is not None
        if self.is_done:
            self.text += self.stream.flush()

    @property
    def told(self) -> str:
        so_far = self.tally
        counted = f"{so_far.tokens} tokens  {so_far.steps} steps"
        return f"{self.name}  {so_far.rate:.0f} tok/s  {so_far.seconds:.1f} s  {counted}"


def race(session: Session, asked: Known, console: Console) -> None:
    """Answer a request both ways; whose own clock is behind takes the next step, so the panes keep their real pace."""
    modes: dict[str, Literal["ar", "space"]] = {"one token at a time": "ar", "SPACE": "space"}
    runners = []
    for name, mode in modes.items():
        # both begin with nothing computed
        steps = session.steps(asked, mode=mode, cache=KVCache())
        stream = TextStream(partial(session.loaded.decode, skip_special_tokens=True))
        runners.append(_Runner(name, steps, stream))
    ar, space = runners
    drawn = 0.0
    with Live(console=console, auto_refresh=False, get_renderable=lambda: _panes(runners, console)) as live:
        while not all(runner.is_done for runner in runners):
            behind = (runner for runner in runners if not runner.is_done)
            min(behind, key=lambda runner: runner.tally.seconds).advance()
            if time.monotonic() - drawn >= _SECONDS_PER_FRAME:
                live.refresh()
                drawn = time.monotonic()
        live.refresh()
    is_same = ar.token_ids == space.token_ids
    same = "the same tokens" if is_same else "other tokens: they part at a near tie"
    console.print(Text(f"{ar.tally.seconds / space.tally.seconds:.2f} times as fast, {same}", style="dim"))


def _panes(runners: list[_Runner], console: Console) -> Columns:
    size = console.size
    width = max(20, size.width // 2 - 1) if size.width >= 60 else size.width
    height = max(4, min(16, size.height - 4 if size.width >= 60 else size.height // 2 - 2))
    panes = []
    for runner in runners:
        body = newest_lines(plain(runner.text), console, width - 4, height - 2)
        done = "green" if runner.is_done else "dim"
        panes.append(Panel(body, title=runner.told, title_align="left", width=width, height=height, border_style=done))
    return Columns(panes, padding=(0, 0))

"""`/race`: the same answer by AR and by SPACE in two panes, each at its real speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from space_cli.cli.answer import ShadedText
from space_cli.cli.console import print_wrapped
from space_cli.cli.live import Frames, Tally, newest_lines
from space_cli.core.cache import KVCache

if TYPE_CHECKING:
    from space_cli.chat.session import Session
    from space_cli.chat.templates import Prefix
    from space_cli.core.stream import Step


@dataclass
class _Runner:
    name: str
    steps: Iterator[Step]
    shaded: ShadedText
    tally: Tally = field(default_factory=Tally)
    token_ids: list[int] = field(default_factory=list)
    is_done: bool = False

    def advance(self) -> None:
        """Take a step."""
        step = next(self.steps)
        self.tally.add(step)
        self.token_ids += step.tokens
        self.shaded.add(step)
        self.is_done = step.finish_reason is not None
        if self.is_done:
            self.shaded.finish()

    @property
    def summary(self) -> str:
        so_far = self.tally
        return f"{so_far.tokens} tokens  {so_far.steps} calls  {so_far.seconds:.1f} s"


def race(session: Session, asked: Prefix, console: Console) -> None:
    """Answer a request both ways; the side with less time used takes the next step, so both panes run at real speed."""
    modes: dict[str, Literal["ar", "space"]] = {"one token at a time": "ar", "SPACE": "space"}
    runners = []
    for name, mode in modes.items():
        # both begin with nothing computed
        steps = session.steps(asked, mode=mode, cache=KVCache())
        runners.append(_Runner(name, steps, ShadedText(session, console, asked.token_ids)))
    ar, space = runners
    with Frames(console, lambda: _panes(runners, console), transient=False) as frames:
        while not all(runner.is_done for runner in runners):
            behind = (runner for runner in runners if not runner.is_done)
            min(behind, key=lambda runner: runner.tally.seconds).advance()
            frames.refresh_if_due()
        frames.refresh()
    is_same = ar.token_ids == space.token_ids
    same = "the same tokens" if is_same else "other tokens: they part at a near tie"
    calls = f"{space.tally.steps} model calls in place of {ar.tally.steps}"
    faster = f"{ar.tally.seconds / space.tally.seconds:.2f} times as fast as one token at a time"
    print_wrapped(console, Text(f"{same} · {calls} · {faster}", style="dim"))


def _panes(runners: list[_Runner], console: Console) -> Columns:
    size = console.size
    width = max(20, size.width // 2 - 1) if size.width >= 60 else size.width
    height = max(4, min(16, size.height - 4 if size.width >= 60 else size.height // 2 - 2))
    texts = [newest_lines(runner.shaded.text, width - 4, height - 2) for runner in runners]
    if all(runner.is_done for runner in runners):
        height = 2 + max(len(text.split("\n", allow_blank=True)) for text in texts)
    panes = []
    for runner, text in zip(runners, texts, strict=True):
        panes.append(
            Panel(
                text,
                title=f"{runner.name}, done" if runner.is_done else runner.name,
                title_align="left",
                subtitle=runner.summary,
                subtitle_align="left",
                width=width,
                height=height,
                border_style="green" if runner.is_done else "dim",
            )
        )
    return Columns(panes, padding=(0, 0))

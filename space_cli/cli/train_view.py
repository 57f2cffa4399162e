"""Views of `space train`, and its closing lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from space_cli.cli.console import err, is_screen, out, plain, table
from space_cli.cli.live import Frames, View

if TYPE_CHECKING:
    from space_cli.models.checkpoint import SpaceConfig
    from space_cli.models.loading import LoadedModel
    from space_cli.training.dry_run import DryRun
    from space_cli.training.prepare import Prepared
    from space_cli.training.run import Recipe

_SECONDS_PER_LINE = 5.0
_RECENT = 6
_EXAMPLE_LINES = 6
_PLOT_WIDTH, _LEVELS = 60, "▁▂▃▄▅▆▇█"


class TrainView(View):
    """Plain lines; `LiveTrainView` draws instead."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        super().__init__(console, quiet=quiet)
        self._last_line = 0.0
        self._phase = ("", 0, 0.0)
        self._begun = time.monotonic()
        self._hours: float | None = None
        self._first_step: int | None = None
        self._rows: list[tuple[str, ...]] = []
        self._held_out: list[list[float]] = []

    def example(self, text: str) -> None:
        """Show how an example is trained; a long one is cut in the middle."""
        lines = text.split("\n")
        if len(lines) > 2 * _EXAMPLE_LINES:
            lines = [
                *lines[:_EXAMPLE_LINES],
                f"    ... {len(lines) - 2 * _EXAMPLE_LINES} lines ...",
                *lines[-_EXAMPLE_LINES:],
            ]
        self.note("the first one, as it is trained:\n" + "\n".join(lines))

    def begin(self, loaded: LoadedModel, prepared: Prepared, recipe: Recipe) -> None:
        """Print the model, the data and the method."""
        self._hours = recipe.hours
        where = f"{loaded.name}, {loaded.num_parameters:,} parameters, {loaded.dtype} {loaded.device}"
        self.note(f"{where}; method {recipe.method}, k = {recipe.candidates}")
        left_out = f", {prepared.empty} without anything to learn left out" if prepared.empty else ""
        cut = f", {prepared.cut} cut by {prepared.cut_tokens} tokens" if prepared.cut else ""
        self.note(f"{len(prepared.examples)} examples{cut}{left_out}; {len(prepared.held_out)} prompts held out")

    def phase(self, name: str, done: int, total: int, rate: float | None = None) -> None:
        """Show the progress of a phase besides the steps, with its tokens per second."""
        if done == total or time.monotonic() - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = time.monotonic()
            self.note(f"{name}: {done}/{total}{self._pace(name, done, total, rate)}")

    def _pace(self, name: str, done: int, total: int, rate: float | None) -> str:
        """Return tokens per second and the time left of a phase that reports its rate."""
        if self._phase[0] != name:
            self._phase = (name, done, time.monotonic())
        _, first, began = self._phase
        if not rate or done <= first:
            return ""
        left = (time.monotonic() - began) / (done - first) * (total - done)
        return f", {rate:.0f} tok/s, {_clock(left)} left"

    def logged(self, step: int, steps: int, logs: dict[str, float]) -> None:
        """Show figures of the last steps, or of the held-out examples."""
        if "eval_mask_loss" in logs:
            self._held_out.append(_accuracies(logs, "eval_"))
            self._show_held_out(step, logs)
        if "loss" not in logs:
            return
        if self._first_step is None:
            self._first_step, self._begun = step, time.monotonic()
        cells = self._cells(step, steps, logs)
        self._rows = [*self._rows, cells][-_RECENT:]
        self._show_row(cells)

    def _show_held_out(self, step: int, logs: dict[str, float]) -> None:
        # an adapter does not change the base's own loss
        loss = f" AR loss {logs['eval_ar_loss']:.3f}," if "eval_ar_loss" in logs else ""
        right = " ".join(f"{accuracy:.0%}" for accuracy in self._held_out[-1])
        self.note(
            f"held-out examples after {step} steps:{loss} mask loss {logs['eval_mask_loss']:.3f}, masks right {right},"
            f" expected tokens per step {logs['eval_expected_tokens_per_step']:.2f}"
        )

    def _show_row(self, cells: tuple[str, ...]) -> None:
        pairs = zip(_HEADINGS, cells, strict=True)
        self.note("  ".join(f"{heading} {cell}" for heading, cell in pairs if cell))

    def _cells(self, step: int, steps: int, logs: dict[str, float]) -> tuple[str, ...]:
        left = self._left(step, steps, logs)
        accuracies = _accuracies(logs, "")
        expected = logs.get("expected_tokens_per_step")
        return (
            f"{step}/{steps}" if self._hours is None else str(step),
            _figure(logs.get("ar_loss")),
            _figure(logs.get("mask_loss")),
            " ".join(f"{100 * accuracy:.0f}" for accuracy in accuracies),
            "" if expected is None else f"{expected:.2f}",
            f"{logs.get('tokens_per_second', 0):.0f}",
            f"{logs.get('memory_bytes', 0) / 2**30:.1f} GiB",
            "" if left is None else _clock(left),
        )

    def _left(self, step: int, steps: int, logs: dict[str, float]) -> float | None:
        """Return the seconds left, None while they are not known."""
        if self._hours is not None:
            return max(0.0, self._hours - logs["hours"]) * 3600
        done = step - (self._first_step or 0)
        return (time.monotonic() - self._begun) / done * (steps - step) if done else None

    def saved(self, folder: Path) -> None:
        """Say that a checkpoint is there."""
        self.note(f"saved {folder}")

    def show_dry_run(self, found: DryRun) -> None:
        """Print the estimate of a training."""
        console, without = out(), ""
        if found.ar_tokens_per_second is not None:
            cost = found.ar_tokens_per_second / found.tokens_per_second
            without = f", {found.ar_tokens_per_second:.0f} without ({cost:.2f} times the cost)"
        whole = _clock(found.steps * found.seconds_per_step)
        console.print(f"trained: {found.trained:,} of {found.parameters:,} parameters")
        console.print(f"memory: {found.memory_bytes / 2**30:.1f} GiB")
        console.print(f"speed: {found.tokens_per_second:.0f} tokens/s with masks{without}")
        console.print(f"time: {found.steps} steps of {found.seconds_per_step:.2f} s, {whole}")

    def conclude(self, space: SpaceConfig, output: Path) -> None:
        """Print the results."""
        console = out()
        for name, each in space.acceptance.items():
            apart = each["tokens_per_step_plain"] if each["repetitive"] else None
            without = "" if apart is None else f", {apart:.2f} without {each['repetitive']} repetitive answers"
            loss = "" if each["answer_loss"] is None else f"; AR loss of their answers {each['answer_loss']:.3f}"
            console.print(
                f"{name} training: {each['tokens_per_step']:.2f} tokens per step on {each['prompts']} held-out prompts"
                f" (k = {each['candidates']}{without}){loss}",
                soft_wrap=True,
            )
        console.print(plain(f"{output}: try `space bench --model {output}`"), soft_wrap=True)


_HEADINGS = ("step", "AR loss", "mask loss", "masks right %", "expected tokens per step", "tok/s", "memory", "left")


class LiveTrainView(TrainView):
    """Redraws a bar and the last rows in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, quiet=False)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console)
        self._task = self._bar.add_task("", visible=False)
        self._frames: Frames = Frames(console, self._render, transient=False)

    def phase(self, name: str, done: int, total: int, rate: float | None = None) -> None:
        """Show the progress of a phase besides the steps, with its tokens per second."""
        description = name + self._pace(name, done, total, rate)
        self._bar.update(self._task, description=description, completed=done, total=total, visible=done < total)
        self._frames.refresh()

    def _show_row(self, cells: tuple[str, ...]) -> None:
        self._frames.refresh()

    def _render(self) -> RenderableType:
        plot = self._plot()
        if not self._rows:
            return Group(plot, self._bar) if self._held_out else self._bar
        # an adapter has no AR loss
        shown = [column for column in range(len(_HEADINGS)) if any(row[column] for row in self._rows)]
        rows = table(*(_HEADINGS[column].replace(" loss", "\nloss") for column in shown))
        rows.columns[0].justify = "right"
        for row in self._rows:
            rows.add_row(*(row[column] for column in shown))
        return Group(rows, plot, self._bar)

    def _plot(self) -> Table:
        """Draw the share of held-out tokens that masks guess right, a line for each depth, from start to now."""
        plot = table("held out", "", "right")
        for depth, line in enumerate(zip(*self._held_out[-_PLOT_WIDTH:], strict=True), start=1):
            plot.add_row(f"mask {depth}", "".join(map(_level, line)), f"{line[-1]:.0%}")
        return plot


def training_view(*, quiet: bool) -> TrainView:
    """Return the view for where standard error goes."""
    console = err()
    if quiet or not is_screen(console):
        return TrainView(console, quiet=quiet)
    return LiveTrainView(console)


def _accuracies(logs: dict[str, float], prefix: str) -> list[float]:
    """Return the accuracy of each mask."""
    start = f"{prefix}mask_accuracy_"
    depths = sorted(int(name.removeprefix(start)) for name in logs if name.startswith(start))
    return [logs[f"{start}{depth}"] for depth in depths]


def _level(fraction: float) -> str:
    """Return a block as high as a fraction of 1.

    >>> "".join(map(_level, (0, 0.5, 1)))
    '▁▅█'
    """
    return _LEVELS[min(len(_LEVELS) - 1, int(fraction * len(_LEVELS)))]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

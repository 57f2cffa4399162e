import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from space_cli.cli.train_view import LiveTrainView, TrainView

LOADED = SimpleNamespace(name="tiny", num_parameters=135_000_000, dtype="bfloat16", device="cpu")
PREPARED = SimpleNamespace(examples=[], held_out=[], cut=0, empty=0)
FIGURES = {"loss": 3.0, "mask_loss": 3.877, "expected_tokens_per_step": 1.74, "tokens_per_second": 232.0}
RIGHT = {f"mask_accuracy_{depth}": 0.55 - depth / 20 for depth in range(1, 6)}


def recipe(hours):
    return SimpleNamespace(method="adapter", candidates=5, hours=hours)


def console(file):
    return Console(file=file, force_terminal=True, width=80, height=24)


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")


def test_hours_are_what_is_left_of_a_training_that_they_end():
    file = io.StringIO()
    view = TrainView(Console(file=file, width=200), quiet=False)

    view.begin(LOADED, PREPARED, recipe(0.2))
    view.logged(60, 10_000_000, {**FIGURES, **RIGHT, "hours": 0.125})

    assert "step 60  mask loss 3.877  masks right % 50 45 40 35 30" in file.getvalue()
    assert "left 4:30" in file.getvalue()


def test_steps_are_what_is_left_of_any_other():
    file = io.StringIO()
    view = TrainView(Console(file=file, width=200), quiet=False)

    view.begin(LOADED, PREPARED, recipe(None))
    for step in (10, 20):
        view.logged(step, 400, FIGURES | RIGHT)

    assert "step 20/400  " in file.getvalue()
    assert re.search(r"left \d+:\d\d", file.getvalue())


@pytest.mark.parametrize("losses", [{}, {"ar_loss": 1.234}])
def test_rows_plot_and_bar_fit_a_terminal(losses):
    file = io.StringIO()
    view = LiveTrainView(console(file))

    view.begin(LOADED, PREPARED, recipe(None))
    with view:
        for step in range(0, 200, 10):
            view.logged(step, 12_000, {**FIGURES, **RIGHT, **losses, "memory_bytes": 4.5 * 2**30})
            held_out = {f"eval_{name}": value for name, value in RIGHT.items()}
            view.logged(step, 12_000, {**held_out, "eval_mask_loss": 3.5, "eval_expected_tokens_per_step": 1.9})
        view.phase("held-out prompts", 3, 24)

    *_, last = file.getvalue().split("\x1b[1A\x1b[2K")
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", last).split("\n")
    assert len(lines) <= 23
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert ("1.234" in last) == bool(losses)
    assert re.search(r"190/12000 .* 50 45 40 35 30 +1\.74 +232 +4\.5 GiB", last)
    assert "mask 5" in last
    assert "3/24" in last

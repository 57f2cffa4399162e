import io
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from space_cli.cli import live
from space_cli.core.stream import Step
from space_cli.models.registry import resolve
from space_cli.report import wording

LOADED = SimpleNamespace(name="tiny", dtype="float32", device="cpu", decode=lambda ids: "".join(map(chr, ids)))


@pytest.fixture
def show(monkeypatch):
    """Feed a text through the live view, two characters a step; return what went to the terminal, less its colours."""
    monkeypatch.setattr(live, "_SECONDS_PER_FRAME", 0)
    monkeypatch.setenv("TERM", "xterm-256color")

    def run(text, *, width=60, height=24, task="suite/1"):
        file = io.StringIO()
        view = live.LiveRunView(Console(file=file, force_terminal=True, width=width, height=height))
        view.begin(LOADED, ["ar", "space"], 2)
        with view:
            view.started("suite", task, "space")
            for start in range(0, len(text), 2):
                piece = tuple(map(ord, text[start : start + 2]))
                view.stepped("space", Step(piece, len(piece) - 1, (), (), 4, 0.01))
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue())

    return run


def test_the_newest_text_stays_in_sight_on_a_long_line(show):
    assert "NEWEST" in show("x = [" + "1, " * 60 + "NEWEST")


def test_a_line_is_broken_where_it_is_full_and_not_between_words():
    newest = live.newest_lines(Text("    return self.name(x)\n\n漢字漢字"), 7, 5)

    assert newest.plain.split("\n") == ["f.name(", "x)", "", "漢字漢", "字"]


def test_the_newest_lines_stay_in_sight_on_a_low_screen(show):
    screen = show("\n".join(f"line {n}" for n in range(40)) + "\nNEWEST", height=10)

    assert "NEWEST" in screen
    assert "tok/step" in screen


def test_the_method_stays_in_sight_beside_a_long_task_name(show):
    assert "space  suite" in show("text", task="a/very/long/folder/" * 5)


def test_model_text_and_task_names_reach_the_terminal_visible_and_harmless(show):
    screen = show("\x1b]0;owned\x07 [red]", task="\x1b]8;;http://x\x07")

    assert "\x1b" not in screen
    assert "␛]0;owned␇ [red]" in screen


def test_steps_are_counted_by_the_tokens_they_brought(show):
    assert "0% 100%" in show("abcd")


def test_long_steps_share_the_last_bar():
    assert wording.histogram(Counter({1: 2, 3: 1, 8: 3, 20: 4})) == "▂ ▁    ▆  20% 0% 10% 0% 0% 0% 0% 70%+"
    assert wording.histogram(Counter({1: 1, 2: 1})).endswith("50% 50%")


def test_a_named_histogram_leaves_out_what_never_occurred():
    assert wording.named_histogram(Counter({1: 2, 3: 1, 8: 3, 20: 4})) == "1 ▂ 20%  3 ▁ 10%  8+ ▆ 70%"
    assert wording.named_histogram(Counter({2: 5})) == "2 █ 100%"


def test_a_model_without_masks_names_the_alias_that_has_some_or_how_to_train_them():
    smollm2 = {"model": "smollm2", "source": resolve("smollm2").source, "masks_per_group": 0}
    other = {"model": "org/model", "source": "org/model", "masks_per_group": 0}

    assert wording.without_masks(smollm2)[0].endswith("--model smollm2-space has some, which guess anywhere.")
    assert "`space train --model org/model --data" in wording.without_masks(other)[0]
    assert wording.without_masks(smollm2 | {"masks_per_group": 5}) == []

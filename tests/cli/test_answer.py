"""How an answer looks: the steps of one, and which text counts as Markdown."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from space_cli.cli import answer
from space_cli.core.stream import Generation, Step

RIGHT_THEN_OWN = Step(tuple(map(ord, "ab\n")), 2, tuple(map(ord, "abx")), (ord("x"),), 4, 0.1)
OWN_ALONE = Step((ord("c"),), 0, (), (), 1, 0.1, "length")


class Screen(io.StringIO):
    def isatty(self):
        return True


def session(*, mode="space", live="text"):
    def decode(token_ids, **_):
        return "".join(map(chr, token_ids))

    return SimpleNamespace(
        loaded=SimpleNamespace(decode=decode), settings=SimpleNamespace(mode=mode, live=live, color="on")
    )


@pytest.fixture
def screen(monkeypatch):
    """Show steps in a terminal; return what stands there at the end, with and without its styles."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def show(steps, *, live="text", width=60, no_color=False):
        file = Screen()
        console = Console(file=file, force_terminal=True, width=width, height=24, no_color=no_color)
        with answer.view_of(session(live=live), console, ()) as view:
            for step in steps:
                view.step(step)
        styled = file.getvalue()
        return styled, re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", styled)

    return show


def says(text):
    return [Step((ord(character),), 0, (), (), 1, 0.01) for character in text]


@pytest.mark.parametrize(
    "code", ["# sum\ndef f(n):\n    return 2**n + 3**n", "f(**a, **b)", "def f(*args, **kwargs): ..."]
)
def test_code_is_not_taken_for_markdown(screen, code):
    _, shown = screen(says(code))

    assert shown.endswith(code + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "so **very** new",
        "```python\npass\n```",
        "- one\n- two",
        "## Title",
        "- old\n+ new\n a * b * c",
        "1. a\n\n    code\n> said\n\n\nend",
        "```\n<b>\n\tx\n",
        "| a | b |\n| - | - |\n",
        "````md\n```\n````\n`x` ~~y~~ [z](http://a)",
    ],
)
def test_markdown_loses_no_character(screen, text):
    _, shown = screen(says(text), width=200)

    assert shown.endswith(text.rstrip().expandtabs(8) + "\n")


@pytest.mark.parametrize("text", ["so **very** new", "```python\npass\n```", "## Title"])
def test_markdown_is_styled_once_it_is_complete(screen, text):
    styled, _ = screen(says(text))

    assert "\x1b[" in styled.rsplit("\x1b[2K", 1)[-1]


@pytest.mark.parametrize("no_color", [False, True])
def test_tokens_of_one_call_are_shaded_alike(screen, no_color):
    styled, _ = screen([RIGHT_THEN_OWN, OWN_ALONE], no_color=no_color)

    final = styled.rsplit("\x1b[2K", 1)[-1]
    assert re.search(r"\x1b\[[\d;]+mab", final)
    assert not re.search(r"\x1b\[[1-9][\d;]*mc", final)


@pytest.mark.parametrize("terminal", ["xterm", "xterm-256color"])
def test_no_shade_is_black_or_white(terminal):
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": terminal})

    for shade in answer.shades_of(console):
        console.print("text", style=shade)

    assert not re.search(r"\x1b\[(3[07]|9[07])m", console.file.getvalue())
    assert console.file.getvalue().count("\x1b[0m") == 2


@pytest.mark.parametrize("width", [40, 100])
def test_a_listed_step_names_guesses_right_ones_wrong_ones_and_the_models_own(screen, width):
    _, shown = screen([RIGHT_THEN_OWN, OWN_ALONE], live="steps", width=width)

    first, second = (line.rstrip() for line in shown.splitlines()[-2:])
    assert first == "   1   2/3 +a +b -x >↵"
    assert second == "   2       >c"
    assert max(map(len, shown.splitlines())) <= width


def test_a_long_listed_step_goes_on_below_its_own_column(screen):
    tokens = tuple(map(ord, "abcdefghijklmnopqrst"))
    _, shown = screen([Step(tokens, 19, tokens[:19], (), 20, 0.1)], live="steps", width=40)

    assert shown.splitlines()[-1].startswith(" " * 11 + "+")


@pytest.mark.parametrize(
    ("steps", "mode", "message"),
    [
        ([RIGHT_THEN_OWN, OWN_ALONE], "space", "tokens per call: 1 ▄ 50%  3 ▄ 50%"),
        ([Step((1,), 0, (2,), (2,), 2, 0.1)], "space", "no guess was right"),
        ([OWN_ALONE], "space", "drafting was not expected to pay"),
        ([OWN_ALONE], "ar", "1 tokens in 1 model calls, 1.00 per call · 10 tokens/s"),
    ],
)
def test_the_lines_below_an_answer_say_what_calls_brought(steps, mode, message):
    lines = answer.summary(session(mode=mode), Generation(steps), speedup=None, context="").splitlines()

    assert lines[-1] == message

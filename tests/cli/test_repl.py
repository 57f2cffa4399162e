"""`space chat` in a terminal: conversations, commands, interruption, and text that means harm."""

import json
import re
import shutil
import sys
from importlib import resources

import pytest

pytest.importorskip("pty", reason="needs a POSIX terminal")

from terminal import Terminal

pytestmark = pytest.mark.pty

ACTING = ["\x1b[2J", "\x1b]8;;http://evil\x07", "\x1b]0;mine\x07", "\x00", "\x9b31m", "\u202e"]
HOSTILE = [*ACTING, "[red]", "\r", "\x08"]


@pytest.fixture
def chat(clean_env, tiny_model_dir, tmp_path):
    """Start `space chat` in a terminal; whatever still runs at the end is killed."""
    begun = []

    def start(*arguments, columns=80, rows=24, model=tiny_model_dir, program=("-m", "space_cli"), **env):
        command = [sys.executable, *program, "chat", "--model", model, "--dtype", "float32", *arguments]
        environment = {name: value for name, value in clean_env.items() if name != "COLUMNS"}
        environment |= {"XDG_STATE_HOME": str(tmp_path / "state")} | env
        terminal = Terminal([str(each) for each in command], env=environment, cwd=tmp_path, columns=columns, rows=rows)
        begun.append(terminal)
        return terminal

    yield start
    for terminal in begun:
        terminal.kill()


def ready(terminal, *, prompts=1):
    """Wait for the prompt's toolbar; a terminal learns of each new prompt that pasted text may come."""
    return terminal.until(
        lambda screen: terminal.raw.count(b"\x1b[?2004h") >= prompts and re.search(r"(?m)^context \d+/", screen)
    )


def say(terminal, text):
    """Type a line, wait until it has been dealt with and there is a prompt again."""
    ready(terminal)
    prompts = terminal.raw.count(b"\x1b[?2004h")
    terminal.type(text + "\r")
    return ready(terminal, prompts=prompts + 1)


def toolbar_figures(screen):
    """The figures of the newest answer: tokens, context used."""
    flat = " ".join(screen.split())
    return int(re.findall(r"(\d+) tokens in", flat)[-1]), int(re.findall(r"context (\d+)/", flat)[-1])


def test_three_turns_undo_save_and_load(chat, tmp_path):
    terminal = chat("--max-new-tokens", "12")

    used = [toolbar_figures(say(terminal, text))[1] for text in ("first", "second", "third")]
    say(terminal, "/save talk.json")
    undone = say(terminal, "/undo")
    say(terminal, "/save later.json")
    loaded = say(terminal, "/load talk.json")
    terminal.type("\x04")

    assert terminal.finish() == 0
    assert used[0] < used[1] < used[2]
    assert "forgotten: third" in undone
    assert "6 turns" in loaded
    saved, later = (json.loads((tmp_path / name).read_text())["turns"] for name in ("talk.json", "later.json"))
    assert [turn["role"] for turn in saved] == ["user", "assistant"] * 3
    assert later == saved[:4]


def test_a_conversation_answers_as_a_fresh_run_of_it_would(chat, tmp_path):
    # nano writes text; the tiny model's bytes are none, and no file can hold them
    terminal = chat("--max-new-tokens", "12", model="nano")
    for text in ("first", "second", "third"):
        say(terminal, text)
    say(terminal, "/save talk.json")
    say(terminal, "/undo")
    turns = json.loads((tmp_path / "talk.json").read_text())["turns"]
    stats = say(terminal, "/stats")
    terminal.type("\x04")
    terminal.finish()

    (tmp_path / "two.json").write_text(json.dumps({"model": "x", "turns": turns[:4]}))
    fresh = chat("--max-new-tokens", "12", "--load", "two.json", model="nano")
    say(fresh, "third")
    say(fresh, "/save again.json")

    assert json.loads((tmp_path / "again.json").read_text())["turns"] == turns
    # each request was computed once: the whole conversation has not many more tokens than were computed
    assert int(re.search(r"the reading of (\d+) prompt tokens", stats)[1]) < 120


def test_ctrl_c_stops_the_answer_and_what_was_said_stays(chat, tmp_path):
    # so hot, and with so much room, that it goes on for minutes
    hot = ("--temperature", "5", "--live", "steps")
    roomy = shutil.copytree(resources.files("space_cli") / "nano" / "weights", tmp_path / "roomy")
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    terminal = chat("--max-new-tokens", "90000", *hot, model=roomy)
    ready(terminal)

    terminal.type("go on\r")
    terminal.until(r"\n +\d+ +>")
    terminal.interrupt()
    stopped = terminal.until("stopped; what was said stays")
    say(terminal, "/set max_new_tokens 8")
    after = say(terminal, "and on")
    terminal.interrupt()
    terminal.until("Ctrl-C again")
    terminal.interrupt()

    assert terminal.finish() == 0
    assert toolbar_figures(stopped)[0] < 90_000
    assert "tokens in" in after


def test_what_is_typed_during_an_answer_waits_unseen_for_the_prompt(chat):
    terminal = chat("--max-new-tokens", "200", "--temperature", "5", "--live", "steps", model="nano")
    ready(terminal)
    terminal.type("go on\r")
    terminal.until(r"\n +\d+ +>")

    terminal.type("/set top_k 5\r")
    terminal.until("(?m)^top_k 5")

    during = terminal.raw.split(b"\x1b[?2004h")[1]
    assert b"200 tokens in" in during
    assert b"top_k" not in during


def test_a_greedy_answer_asked_for_again_says_why_it_is_the_same(chat):
    terminal = chat("--max-new-tokens", "6")
    say(terminal, "run")

    assert "greedy, so the answer stays the same" in say(terminal, "/retry")


@pytest.mark.parametrize(("mode", "greeting"), [("space", "is shaded alike"), ("ar", "yields one token")])
def test_the_first_screen_says_what_a_model_call_does(chat, mode, greeting):
    assert greeting in " ".join(ready(chat("--mode", mode)).split())


BREAKING = """
import space_cli.api.model as model
from space_cli.cli.app import main
decode, calls = model.decode, []

def breaking(*arguments, **options):
    calls.append(1)
    for number, step in enumerate(decode(*arguments, **options)):
        if len(calls) == 1 and number == 2:
            raise RuntimeError("not enough memory\\nat some place")
        yield step

model.decode = breaking
main()
"""


def test_an_answer_that_breaks_off_does_not_end_the_chat(chat):
    # one token a step: how many steps drafts leave is decided by measured time
    terminal = chat("--max-new-tokens", "12", "--mode", "ar", program=("-c", BREAKING))

    screen = say(terminal, "first")
    assert "the answer broke off: not enough memory" in screen
    assert "stopped; what was said stays" in screen
    assert toolbar_figures(say(terminal, "second"))[0] == 12


def test_settings_modes_and_mistakes(chat):
    terminal = chat("--max-new-tokens", "8")

    assert "temperature 0.7" in say(terminal, "/set temperature 0.7")
    assert "no setting 'heat'" in say(terminal, "/set heat 1")
    assert "greater than or equal to 0" in say(terminal, "/set temperature -1")
    assert "did you mean /save?" in say(terminal, "/sav x")
    assert "is there already" in say(terminal, "/save state")
    assert "mode space" in say(terminal, "/mode")
    assert "one token at a time" in say(terminal, "/mode ar")
    assert "Input should be 'space' or 'ar'" in say(terminal, "/mode fast")
    assert "nothing to race with" in say(terminal, "/race")
    assert "no answer to copy" in say(terminal, "/copy")
    assert "no answer yet" in say(terminal, "/stats")
    assert "Be brief." in say(terminal, "/system Be brief.")
    assert "could not be loaded" in say(terminal, "/model absent/none")
    assert "max_new_tokens" in say(terminal, "/set")
    terminal.type("/exit\r")
    assert terminal.finish() == 0


def test_a_race_shows_both_and_the_same_text(chat):
    terminal = chat("--max-new-tokens", "30", columns=100)
    say(terminal, "run")

    raced = say(terminal, "/race")

    assert "one token at a time" in raced
    assert re.search(r"the same tokens · \d+ model calls in place of 30 · [\d.]+ times as fast", raced)
    assert raced.count(", done") == 2


def test_a_record_needs_a_prompt(chat):
    terminal = chat("--json", "-")

    terminal.until("--json needs a prompt; give --prompt TEXT, or pipe it in")
    assert terminal.finish() == 2


def test_retry_and_copy_and_steps(chat):
    terminal = chat("--max-new-tokens", "8", "--temperature", "1.0")
    say(terminal, "run")

    again = say(terminal, "/retry")
    say(terminal, "/copy")
    steps = say(terminal, "/live steps")
    listed = say(terminal, "run on")

    assert again.count("tokens in") == 2
    assert b"\x1b]52;c;" in terminal.raw
    assert "live steps" in steps
    assert re.search(r"^ +1  ", listed, re.MULTILINE)


def test_several_lines(chat, tmp_path):
    terminal = chat("--max-new-tokens", "6")
    ready(terminal)

    terminal.type('"""one\r')
    terminal.type('two"""\r')
    terminal.until("tokens in")
    ready(terminal)
    terminal.type("three\x1b\rfour\r")
    terminal.until(r"(?s)tokens in.*tokens in")
    # as a terminal pastes a file
    ready(terminal)
    terminal.type("\x1b[200~five\nsix\x1b[201~\r")
    terminal.until(r"(?s)tokens in.*tokens in.*tokens in")
    say(terminal, "/save talk.json")

    turns = json.loads((tmp_path / "talk.json").read_text())["turns"]
    assert [turn["content"] for turn in turns[::2]] == ["one\ntwo", "three\nfour", "five\nsix"]


@pytest.mark.parametrize("columns", [40, 120])
def test_a_narrow_and_a_resized_terminal(chat, columns):
    terminal = chat("--max-new-tokens", "60", columns=columns)
    first = say(terminal, "run")
    terminal.resize(60, 30)

    second = say(terminal, "on")

    assert toolbar_figures(first)[0] == 60
    assert "tokens per call:" in second


def test_without_colour_no_colour_is_sent(chat):
    terminal = chat("--max-new-tokens", "30", NO_COLOR="1")
    say(terminal, "run")

    assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", terminal.raw)


def test_the_newest_conversation_is_taken_up_again(chat):
    terminal = chat("--max-new-tokens", "6")
    say(terminal, "first")
    terminal.type("\x04")
    terminal.finish()

    again = chat("--max-new-tokens", "6", "--continue")
    undone = say(again, "/undo")

    assert "forgotten: first" in undone


@pytest.mark.parametrize(("context", "expected"), [("stop", "leaves no room"), ("shift", "oldest turns were dropped")])
def test_a_full_context_is_reported(chat, context, expected):
    terminal = chat("--max-new-tokens", "200", "--context", context)
    say(terminal, "x " * 60)

    assert expected in say(terminal, "y " * 60).replace("\n", "")


def test_hostile_text_does_nothing_to_the_terminal(chat, tiny_models, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|end|>", *(f"{HOSTILE[n % len(HOSTILE)]}w{n} " for n in range(1, 300))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    folder = tmp_path / "hostile"
    tiny_models["llama"].save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    terminal = chat("--max-new-tokens", "60", model=folder)

    screen = say(terminal, "attack")
    say(terminal, "/live steps")
    say(terminal, "attack again")

    assert "\N{SYMBOL FOR ESCAPE}[2J" in screen
    assert "[red]" in screen
    assert not any(text.encode() + b"w" in terminal.raw for text in ACTING)
    assert b"evil" not in b"".join(re.findall(rb"\x1b\][^\x07\x1b]*", terminal.raw))

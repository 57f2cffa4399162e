"""Streams that take no odd character, and colour without a terminal."""

import errno
import io
import json
import os
import re
import subprocess
import sys

import pytest
import typer
from rich.console import Console

from space_cli.cli import app, console, streams
from space_cli.cli.live import LiveRunView, run_view

CURSOR = re.compile(r"\x1b\[[\d;?]*[ABCDEFGHJKLMSTfhlnsu]")
FAST = ("--dtype", "float32", "--max-new-tokens", "8")


@pytest.fixture
def ascii_space(clean_env, tmp_path):
    """Run `space` in a process whose streams are ASCII."""

    def run(*arguments, **env):
        return subprocess.run(
            [sys.executable, "-m", "space_cli", *map(str, arguments)],
            capture_output=True,
            env=clean_env | {"PYTHONIOENCODING": "ascii"} | env,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            timeout=300,
            check=False,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("verify-lossless", "--limit", "1", "--candidates", "3", "--drafts", "mixed"),
        ("bench", "--limit", "1", "--methods", "ar,space", "--profile"),
        ("chat", "--prompt", "é", "--raw", "--stats"),
        ("chat", "--prompt", "é", "--raw", "--live", "steps"),
    ],
)
def test_an_ascii_stream_ends_no_run(ascii_space, tiny_model_dir, command):
    done = ascii_space(*command, "--model", tiny_model_dir, *FAST)

    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").strip()
    assert b"UnicodeEncodeError" not in done.stderr


def test_json_on_an_ascii_stream_loses_nothing(ascii_space, tiny_model_dir):
    done = ascii_space(
        "chat", "--model", tiny_model_dir, "--prompt", "é", "--raw", *FAST, "--json", "-", PYTHONUTF8="0"
    )

    record = json.loads(done.stdout.decode("ascii"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert record["text"] == tokenizer.decode(record["token_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_a_stream_cannot_encode_is_replaced_and_json_escaped(monkeypatch, encoding):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    streams.never_fail_for_a_character()

    console.out().print("▂█ · ✓ 🚀 ж")
    console.write_json(lambda: json.dumps({"a": "é🚀"}, ensure_ascii=False), "-")

    shown, record = written.getvalue().decode(encoding).split("\n")
    assert json.loads(record) == {"a": "é🚀"}
    assert shown == ("▂█ · ✓ 🚀 ж" if encoding == "utf-8" else shown)
    if encoding == "ascii":
        assert shown == "_# - v \\U0001f680 \\u0436"


# Colour without a terminal


def test_colour_that_is_asked_for_moves_no_cursor(space, tiny_model_dir):
    done = space(
        "bench", "--model", tiny_model_dir, "--limit", "1", "--methods", "ar", *FAST, FORCE_COLOR="1", TERM="xterm"
    )
    chatted = space(
        "chat", "--model", tiny_model_dir, "--prompt", "def add(a):", *FAST, FORCE_COLOR="1", TTY_COMPATIBLE="1"
    )

    assert (done.returncode, chatted.returncode) == (0, 0), (done, chatted)
    for stream in (done.stdout, done.stderr, chatted.stdout, chatted.stderr):
        assert not CURSOR.search(stream)
    assert "\x1b[" in done.stdout


def test_a_pipe_is_no_screen_whatever_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    assert Console(stderr=True).is_terminal
    assert not isinstance(run_view(quiet=False), LiveRunView)


def test_names_of_models_keep_their_tabs_in_colour(space):
    done = space("models", "list", FORCE_COLOR="1")

    assert done.stdout.splitlines()[0] == "name\there\tsize\tSPACE\twhere"


def test_a_reader_that_leaves_in_the_middle_is_no_failed_check(monkeypatch):
    def write():
        raise BrokenPipeError(errno.EPIPE, "nobody reads")

    command = typer.Typer()
    command.command()(write)
    monkeypatch.setattr(app, "app", command)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    # typer puts its own in their place
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)

    assert app.run([]) == 0

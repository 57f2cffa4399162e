"""What is typed into the prompt loop and is no text, or stands behind a `~`."""

import os
import sys

import pytest
from terminal import Terminal

pytestmark = [pytest.mark.pty, pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")]


@pytest.fixture
def chat(clean_env, tiny_model_dir, tmp_path):
    environment = {name: value for name, value in clean_env.items() if name != "COLUMNS"}
    environment |= {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    (tmp_path / "ckpt").symlink_to(tiny_model_dir)
    command = [sys.executable, "-m", "space_cli", "chat", "--model=~/ckpt", "--dtype", "float32", "--mode", "ar"]
    terminal = Terminal([*command, "--max-new-tokens", "4"], env=environment, cwd=tmp_path)
    yield terminal
    terminal.kill()


def test_bytes_that_are_no_text_are_reported_and_the_loop_goes_on(chat):
    chat.until("Ask something")
    chat.until(r"> $|> *\n")
    os.write(chat._fd, b"caf\xe9\r")

    chat.until("what was typed: not UTF-8 text")
    chat.type("/model ~/ckpt\r")
    chat.until("the conversation goes on")
    chat.type("/exit\r")
    assert chat.finish() == 0

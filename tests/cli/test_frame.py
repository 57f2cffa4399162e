import os
import re
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.cli.app import run
from space_cli.text import visible

DOCS = Path(__file__).parents[2] / "docs"


def test_help_names_the_commands_and_exit_codes_without_torch(clean_env):
    code = (
        "import sys; from space_cli.cli.app import run; code = run(['--help']);"
        "loaded = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules); sys.exit(code or bool(loaded) * 9)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env, check=False)

    assert done.returncode == 0
    assert "bench" in done.stdout
    assert "130 interrupted" in " ".join(done.stdout.split())


def test_help_names_pages_that_there_are(run_space):
    text = run_space("--help").stdout

    pages = re.findall(r"[\w-]+\.md", text)

    assert {"chat.md", "serve.md", "bench.md", "lossless.md", "train.md", "models.md"} <= set(pages)
    assert all((DOCS / page).is_file() for page in pages)


@pytest.mark.parametrize(
    "arguments",
    ["-h", "bench --help", "bench -h", "bench --list", "models -h", "models list -h", "--version"],
)
def test_information_goes_to_standard_output(run_space, arguments):
    done = run_space(*arguments.split())

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bnech"], "No such command 'bnech'"),
        (["models", "lits"], "No such command 'lits'"),
        (["bench", "surplus"], "No such command 'surplus'"),
        (["chat", "surplus"], "unexpected extra argument(s) (surplus)"),
        (["bench", "--nope"], "No such option: --nope"),
        (["bench", "--limit"], "Option '--limit' requires an argument"),
        (["bench", "--limit", "x"], "should be a valid integer"),
        (["chat", "--engine", "fast"], "Invalid value for '--engine': 'fast' is not one of"),
        (["bench", "--limit", "0"], "should be greater than or equal to 1"),
        (["bench", "--temperature", "-1"], "should be greater than or equal to 0"),
        (["bench", "--top-p", "2"], "should be less than or equal to 1"),
        (["bench", "--top-p", "0"], "--top-p 0.0: Input should be greater than 0"),
        (["verify-lossless", "--top-p", "0"], "--top-p 0.0: Input should be greater than 0"),
        (["chat", "--prompt", "x", "--top-p", "0"], "--top-p 0.0: Input should be greater than 0"),
        (["bench", "--dtype", "int4"], "Invalid value for '--dtype': 'int4' is not one of"),
        (["bench", "--max-new-tokens", "0"], "should be greater than or equal to 1"),
        (["bench", "--suite", "absent.jsonl"], "no suite and no file named 'absent.jsonl'"),
        (["bench", "--model", "nan0"], "no model named 'nan0', and no such folder; did you mean nano?"),
        (["bench", "--models-file", "absent.toml"], "absent.toml: No such file"),
        (["bench", "--json", "absent/run.json"], "--json absent/run.json: there is no folder"),
        (["bench", "--json", "."], "--json .: is a folder; give a file"),
        (["models", "list", "--json", "absent/models.json"], "there is no folder"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(run_space, arguments, message):
    done = run_space(*arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("space:")] == done.stderr.splitlines()[-1:]


def test_a_record_that_may_not_be_written_is_reported_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)

    code = run(["models", "list", "--json", str(tmp_path / "models.json")])

    assert code == 2
    assert f"may not write into {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["models"]])
def test_no_command_shows_help(run_space, arguments):
    done = run_space(*arguments)

    assert done.returncode == 2
    assert "Usage: space" in done.stderr + done.stdout


def test_mlx_spellings_are_understood_and_not_shown(run_space):
    shown = run_space("bench", "--help").stdout

    assert "--max-tokens" not in shown
    assert "--temp " not in shown
    assert "'--temperature': Input" in run_space("bench", "--temp", "-1").stderr
    assert "'--max-new-tokens': Input" in run_space("bench", "--max-tokens", "0").stderr


def test_completion_offers_the_names_of_models(clean_env):
    asked = {"_SPACE_COMPLETE": "complete_bash", "COMP_WORDS": "space bench --model vi", "COMP_CWORD": "3"}
    script = "import sys; from space_cli.cli.app import run; sys.exit(run([]))"

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=clean_env | asked, check=False
    )

    assert (done.returncode, done.stdout.split()) == (0, ["vicuna-v1.3-7b-space"])


@pytest.mark.parametrize(
    ("terminal", "has_colour"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colour_follows_the_environment(clean_env, terminal, has_colour):
    script = "from space_cli.cli.console import out, plain; out().print(plain('x', style='green'))"

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=clean_env | terminal, check=False
    )

    assert ("\x1b[32m" in done.stdout) is has_colour


def test_debug_shows_the_traceback(run_space):
    for done in (run_space("--debug", "bench", "--suite", "x"), run_space("bench", "--suite", "x", SPACE_DEBUG="1")):
        assert done.returncode == 2
        assert "Traceback" in done.stderr


@pytest.mark.parametrize(("options", "is_shown"), [([], False), (["--debug"], True)], ids=["by default", "debug"])
def test_what_libraries_warn_of_is_for_debug_alone(clean_env, options, is_shown):
    script = (
        "import logging, sys, warnings; from space_cli.cli import app, console\n"
        "@app.app.command('warn')\ndef warn():\n"
        "    console.quiet_libraries()\n"
        "    from transformers.utils import logging as theirs\n"
        "    warnings.warn('old keyword', FutureWarning)\n"
        "    theirs.get_logger('transformers.generation').warning_once('old setting')\n"
        "    logging.getLogger('accelerate.utils').warning('old flag')\n"
        "sys.exit(app.run([*sys.argv[1:], 'warn']))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, *options], capture_output=True, text=True, env=clean_env, check=False
    )

    assert done.returncode == 0, done.stderr
    assert [text in done.stderr for text in ("old keyword", "old setting", "old flag")] == [is_shown] * 3
    assert is_shown or done.stderr == ""


@pytest.mark.parametrize(
    ("raised", "line", "code"),
    [
        ("KeyboardInterrupt()", "space: interrupted", 130),
        ("OSError(28, 'No space left on device', 'out.json')", "space: the disk is full: out.json", 3),
        ("MemoryError()", "space: out of memory", 3),
        ("RuntimeError('one\\ntwo')", "space: RuntimeError: one (rerun", 3),
        ("RunFailed('a.', hint='b')", "space: a; b", 3),
        ("UsageProblem('\\x1b[31mred')", "space: ␛[31mred", 2),
        ("BrokenPipeError()", "", 0),
    ],
)
def test_every_kind_of_error_has_its_line_and_code(clean_env, raised, line, code):
    script = (
        "import sys; from space_cli.cli import app; from space_cli.errors import *\n"
        f"@app.app.command('fail')\ndef fail():\n    raise {raised}\n"
        "sys.exit(app.run(['fail']))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, encoding="utf-8", env=clean_env, check=False
    )

    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == bool(line)


@given(st.text())
def test_nothing_a_terminal_obeys_gets_through(text):
    shown = visible(text)

    assert not any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t" for character in shown)
    shown.encode("utf-8")


def test_known_attacks_become_visible():
    assert visible("\x1b]8;;http://x\x07a\x9b31m\r\x00\u202e\ud800") == ("␛]8;;http://x␇a\\x9b31m␍␀\\u202e\\ud800")


def test_package_runs_as_a_module(run_space_apart):
    assert run_space_apart("--version").stdout.startswith("space ")


def test_ctrl_c_while_python_leaves_shows_no_traceback(clean_env):
    code = (
        "import atexit, os, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT);"
        "from space_cli.cli.app import main; main(['--version'])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env, check=False)

    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")

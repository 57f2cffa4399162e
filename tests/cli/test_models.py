import json
import os
import subprocess
import sys

import pytest


def test_rows_have_tabs_between_where_there_is_no_terminal(run_space):
    done = run_space("models", "list")

    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert rows[0] == ["name", "here", "SPACE", "where"]
    assert rows[1][0] == "nano"
    assert rows[1][3] == "in this package"
    assert rows[2] == ["vicuna-v1.3-7b-space", "no", "k = 5, m = 5", "Hub: AntMan/vicuna-v1.3-7b-space"]


def test_json_holds_every_field(run_space, tmp_path):
    done = run_space("models", "list", "--json", "-")
    to_file = run_space("models", "list", "--json", "models.json")

    record = json.loads(done.stdout)
    assert (to_file.returncode, to_file.stdout) == (0, "")
    assert json.loads((tmp_path / "models.json").read_text()) == record
    assert [status["name"] for status in record["models"]] == ["nano", "vicuna-v1.3-7b-space"]
    assert record["models"][1] == {
        "name": "vicuna-v1.3-7b-space",
        "description": "The SPACE authors' checkpoint of Vicuna 7B v1.3 (14 GB download)",
        "kind": "hub",
        "source": "AntMan/vicuna-v1.3-7b-space",
        "revision": None,
        "present": False,
        "trained": True,
        "candidates": 5,
        "masks_per_group": 5,
        "problem": None,
    }


def test_users_models_are_added(run_space, tmp_path, tiny_model_dir):
    (tmp_path / "mine.toml").write_text(f"[models.mine]\nsource = {json.dumps(str(tiny_model_dir))}\n")

    done = run_space("models", "list", "--models-file", "mine.toml")

    assert done.stdout.splitlines()[-1].split("\t") == ["mine", "yes", "k = 3, m = 3", str(tiny_model_dir)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[models.a\n", "models.toml: not TOML"),
        ('[models.a]\nsource = "x"\nmask_ids = [1]\n', "models.toml: models.a.mask_ids: Extra inputs"),
        ('[models.a]\nsource = 3\n[models."\x1b[31m"]\n', "not TOML"),
    ],
)
def test_a_malformed_models_file_is_one_line(run_space, tmp_path, text, told):
    (tmp_path / "models.toml").write_text(text)

    done = run_space("models", "list", "--models-file", "models.toml")

    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_hostile_names_stay_in_their_cell(run_space, tmp_path):
    (tmp_path / "m.toml").write_text(
        '[models."a\\u001b[31m\\tb\\nc"]\nsource = "org/x"\nrevision = "\\u202e[red]"\n', encoding="utf-8"
    )

    last = run_space("models", "list", "--models-file", "m.toml").stdout.splitlines()[-1].split("\t")

    assert last == ["a␛[31m b c", "no", "unknown", "Hub: org/x @ \\u202e[red]"]


def test_torch_stays_unloaded(clean_env):
    code = (
        "import sys; from space_cli.cli.app import run; code = run(['models', 'list']);"
        "sys.exit(code or bool({'torch', 'transformers', 'numpy'} & set(sys.modules)) * 9)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=clean_env, check=False)

    assert done.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_table(clean_env):
    import pty

    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "space_cli", "models", "list"]
    done = subprocess.run(command, env=clean_env, stdin=terminal, stdout=terminal, stderr=terminal, check=False)
    os.close(terminal)
    screen = os.read(controller, 65536).decode("utf-8")
    os.close(controller)

    assert done.returncode == 0
    assert "\t" not in screen
    assert "vicuna-v1.3-7b-space" in screen

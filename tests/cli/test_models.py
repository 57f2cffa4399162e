import json
import os
import subprocess
import sys

import pytest


def test_rows_have_tabs_between_where_there_is_no_terminal(run_space_apart):
    done = run_space_apart("models", "list")

    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert rows[0] == ["name", "here", "size", "SPACE", "where"]
    assert rows[1][0] == "nano"
    assert rows[1][2].endswith(" MB")
    assert rows[1][4] == "in this package"
    assert [rows[2][0], rows[3][0]] == ["smollm2", "smollm2-space"]
    assert rows[4] == ["vicuna-v1.3-7b-space", "no", "", "k = 5, m = 5", "Hub: AntMan/vicuna-v1.3-7b-space"]


def test_json_holds_every_field(run_space, tmp_path):
    done = run_space("models", "list", "--json", "-")
    to_file = run_space("models", "list", "--json", "models.json")

    record = json.loads(done.stdout)
    assert (to_file.returncode, to_file.stdout) == (0, "")
    assert json.loads((tmp_path / "models.json").read_text()) == record
    names = ["nano", "smollm2", "smollm2-space", "vicuna-v1.3-7b-space"]
    assert [status["name"] for status in record["models"]] == names
    assert record["models"][3] == {
        "name": "vicuna-v1.3-7b-space",
        "description": "The SPACE authors' checkpoint of Vicuna 7B v1.3 (14 GB download)",
        "kind": "hub",
        "source": "AntMan/vicuna-v1.3-7b-space",
        "revision": None,
        "present": False,
        "size_bytes": None,
        "trained": True,
        "candidates": 5,
        "masks_per_group": 5,
        "problem": None,
    }


def test_users_models_are_added(run_space, tmp_path, tiny_model_dir):
    (tmp_path / "mine.toml").write_text(f"[models.mine]\nsource = {json.dumps(str(tiny_model_dir))}\n")

    done = run_space("models", "list", "--models-file", "mine.toml")

    cells = done.stdout.splitlines()[-1].split("\t")
    assert (*cells[:2], *cells[3:]) == ("mine", "yes", "k = 3, m = 3", str(tiny_model_dir))


def test_a_name_of_ones_own_is_added_and_works_everywhere(run_space, tmp_path, tiny_model_dir):
    home = {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    added = run_space("models", "add", 'my "own"', tiny_model_dir, "--template", r"Q {}\nA", **home)
    again = run_space("models", "add", 'my "own"', tiny_model_dir, **home)
    other = run_space(
        "models", "add", "far", "org/model", "--mask-token-ids", "5,6", "--candidates", "2", "--revision", "v1", **home
    )
    listed = json.loads(run_space("models", "list", "--json", "-", **home).stdout)["models"]
    checked = run_space("models", "check", 'my "own"', "--dtype", "float32", **home)

    assert (added.returncode, again.returncode, other.returncode, checked.returncode) == (0, 2, 0, 0)
    assert "has the name" in again.stderr
    assert [status["name"] for status in listed[4:]] == ['my "own"', "far"]
    assert (listed[5]["candidates"], listed[5]["revision"]) == (2, "v1")
    assert "LlamaForCausalLM" in checked.stdout
    assert checked.stdout.splitlines()[-1] == 'my "own" decodes in blocks'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "x", "no/such/folder"], "neither a folder, nor a GGUF file, nor a Hub id"),
        (["add", "x", "org/model", "--candidates", "3"], "belong together"),
        (["add", "x", "org/model", "--candidates", "3", "--mask-token-ids", "a"], "not numbers"),
        (["check", "absent"], "no model named 'absent'"),
        (["check"], "Missing argument"),
    ],
)
def test_wrong_names_are_one_line(run_space, arguments, message):
    done = run_space("models", *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[models.a\n", "models.toml: not TOML"),
        ('[models.a]\nsource = "x"\nmask_ids = [1]\n', "models.toml: models.a.mask_ids: Extra inputs"),
        ('[models.a]\nsource = 3\n[models."\x1b[31m"]\n', "not TOML"),
    ],
)
def test_a_malformed_models_file_is_one_line(run_space, tmp_path, text, message):
    (tmp_path / "models.toml").write_text(text)

    done = run_space("models", "list", "--models-file", "models.toml")

    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_hostile_names_stay_in_their_cell(run_space, tmp_path):
    (tmp_path / "m.toml").write_text(
        '[models."a\\u001b[31m\\tb\\nc"]\nsource = "org/x"\nrevision = "\\u202e[red]"\n', encoding="utf-8"
    )

    last = run_space("models", "list", "--models-file", "m.toml").stdout.splitlines()[-1].split("\t")

    assert last == ["a␛[31m b c", "no", "", "unknown", "Hub: org/x @ \\u202e[red]"]


def test_torch_stays_unloaded(clean_env):
    code = (
        "import sys; from space_cli.cli.app import run; code = run(['models', 'list']);"
        "sys.exit(code or bool({'torch', 'transformers', 'numpy'} & set(sys.modules)) * 9)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=clean_env, check=False)

    assert done.returncode == 0


@pytest.mark.pty
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

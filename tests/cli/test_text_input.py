"""Text that is none, in odd encodings, or behind a `~`: wherever it enters a command."""

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import refusal

from space_cli.errors import UsageProblem
from space_cli.models.registry import ModelEntry, add_model, read_models
from space_cli.rows import read_file
from space_cli.text import decoded, prose

LATIN = b"caf\xe9"
FAST = ("--dtype", "float32", "--max-new-tokens", "4")


# What is no UTF-8


@pytest.mark.parametrize(
    ("arguments", "piped", "where"),
    [
        (["chat", "--prompt", LATIN], b"", "--prompt: not UTF-8 text: character 4 is the byte 0xe9"),
        (["chat", "--prompt", "x", "--system", LATIN], b"", "--system: not UTF-8 text"),
        (["chat", "--prompt", "x", "--template", b"{}" + LATIN], b"", "--template: not UTF-8 text"),
        (["chat"], b"one\n" + LATIN, "standard input:2: not UTF-8 text"),
        (["chat", "--prompt", "x", "--system-file", "system.txt"], b"", "system.txt:1: not UTF-8 text"),
        (["models", "add", "m", "org/m", "--description", LATIN], b"", "description: not UTF-8 text"),
        (["models", "add", LATIN, "org/m"], b"", "name: not UTF-8 text"),
    ],
)
def test_what_is_no_utf8_is_one_line_wherever_it_enters(space, tmp_path, arguments, piped, where):
    (tmp_path / "system.txt").write_bytes(LATIN)

    assert where in refusal(space(*arguments, text=piped))


def test_a_file_whose_name_is_no_utf8_can_be_a_suite_and_a_record(space, tmp_path, tiny_model_dir):
    name = LATIN + b".jsonl"
    with open(tmp_path.as_posix().encode() + b"/" + name, "w") as stream:
        stream.write('{"prompt": "def f():"}\n')

    done = space(
        "bench", "--model", tiny_model_dir, "--suite", name, "--methods", "ar", *FAST,
        "--json", "r.json", "--report", "r.html",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["complete"]


# Byte order marks


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_names_the_encoding_and_is_dropped(encoding):
    text = 'a\n{"text": "né 🚀"}\n'
    content = b"\xfe\xff" + text.encode(encoding) if encoding == "utf-16-be" else text.encode(encoding)

    assert decoded(content, "x") == prose(content, "x") == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_files_of_rows_with_a_mark_are_read(encoding, name, tmp_path):
    rows = "text\nné 🚀\n" if name == "rows.csv" else '{"text": "né 🚀"}\n'
    (tmp_path / name).write_text(rows, encoding)
    (tmp_path / "array.json").write_text('[{"text": "né 🚀"}]', encoding)

    for file in (name, "array.json"):
        assert [row.value for row in read_file(tmp_path / file)] == [{"text": "né 🚀"}]


def test_utf16_without_a_mark_is_reported(space):
    assert "standard input:1: holds a NUL character" in refusal(space("chat", text="hello".encode("utf-16-le")))


def test_piped_utf16_is_the_text_it_stands_for(space, tiny_model_dir):
    common = ("chat", "--model", tiny_model_dir, "--raw", *FAST, "--json", "-")

    plain, wide, marked = (
        json.loads(space(*common, text=text).stdout)
        for text in ("é = 1\n".encode(), "é = 1\n".encode("utf-16"), "é = 1\n".encode("utf-8-sig"))
    )

    assert plain["token_ids"] == wide["token_ids"] == marked["token_ids"]
    assert plain["prompt_tokens"] == wide["prompt_tokens"] == marked["prompt_tokens"]


def test_models_toml_and_space_config_may_begin_with_a_mark(space, tmp_path, tiny_model_dir):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "space_config.json").write_text((folder / "space_config.json").read_text(), "utf-8-sig")
    (tmp_path / "m.toml").write_text('[models.mine]\nsource = "./copy"\n', "utf-8-sig")

    done = space("models", "check", "mine", "--models-file", "m.toml", "--json", "-")

    assert json.loads(done.stdout)["candidates"] == 3


# models.toml


@given(st.text(), st.text(min_size=1), st.text().map(lambda text: text.replace("{}", "") + "{}"))
def test_any_text_round_trips_through_models_toml(description, name, template):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "models.toml"
        entries = {
            name: ModelEntry(source=f"org/{description}", description=description, prompt_template=template),
            name + "2": ModelEntry(source="org/x", mask_token_ids=[1, 2], candidates=2),
        }
        if template.count("{}") == 1:
            for each, entry in entries.items():
                add_model(each, entry, file)
            found = read_models(file)
            assert {each: found[each] for each in entries} == entries


def test_a_description_with_a_rocket_breaks_nothing(space, tiny_model_dir, tmp_path):
    home = {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    added = space("models", "add", "small", tiny_model_dir, "--description", "tiny 🚀 \\ \"'\x7f", **home)
    listed = space("models", "list", "--json", "-", **home)

    assert (added.returncode, listed.returncode) == (0, 0), added.stderr + listed.stderr
    assert json.loads(listed.stdout)["models"][-1]["description"] == "tiny 🚀 \\ \"'\x7f"


def test_what_a_person_wrote_into_the_file_stays(tmp_path):
    file = tmp_path / "models.toml"
    file.write_text('# mine\n[models.a] # first\nsource = "org/a"\n', "utf-8-sig")

    add_model("b", ModelEntry(source="org/b"), file)

    assert file.read_text("utf-8").startswith('# mine\n[models.a] # first\nsource = "org/a"\n')
    assert set(tomllib.loads(file.read_text("utf-8"))["models"]) == {"a", "b"}


def test_what_would_not_be_read_back_replaces_nothing(tmp_path, monkeypatch):
    file = tmp_path / "models.toml"
    file.write_text('[models.a]\nsource = "org/a"\n')
    monkeypatch.setattr("space_cli.models.registry.tomlkit.dumps", lambda _: '[models.b]\nsource = "other"\n')

    with pytest.raises(UsageProblem, match="nothing was written"):
        add_model("b", ModelEntry(source="org/b"), file)

    assert file.read_text() == '[models.a]\nsource = "org/a"\n'


@pytest.mark.parametrize("template", ["User:", "{} and {}", ""])
def test_a_template_without_its_one_gap_is_refused(space, tmp_path, template):
    (tmp_path / "m.toml").write_text(f'[models.m]\nsource = "org/m"\nprompt_template = "{template}"\n')

    for command in (["models", "add", "m", "org/m"], ["chat", "--prompt", "x"], ["train", "--data", "x", "-o", "y"]):
        assert "must hold {} once" in refusal(space(*command, "--template", template))
    assert "models.m.prompt_template" in refusal(space("models", "check", "m", "--models-file", "m.toml"))


# The home folder


def test_a_tilde_is_the_home_folder_in_every_path(space, tmp_path, tiny_model_dir):
    home = tmp_path / "home"
    home.mkdir()
    (home / "ckpt").symlink_to(tiny_model_dir)
    (home / "p.jsonl").write_text('{"prompt": "def f():"}\n')
    (home / "m.toml").write_text('[models.mine]\nsource = "~/ckpt"\n')
    (home / "system.txt").write_text("Be brief.")
    (home / "p.txt").write_text('{"prompt": "def f():"}\n')
    own = {"HOME": str(home)}

    benched = space(
        "bench", "--model=~/ckpt", "--suite=~/p.jsonl", "--suite=cip=~/p.jsonl", "--methods", "ar,space", *FAST,
        "--json=~/r.json", "--report=~/r.html", "--plot=~/r.png", **own,
    )  # fmt: skip
    chatted = space(
        "chat", "--model", "mine", "--models-file=~/m.toml", "--system-file=~/system.txt", *FAST, text=b"hi", **own
    )
    added = space("models", "add", "x", "~/ckpt", "--models-file=~/m.toml", **own)

    assert (benched.returncode, chatted.returncode, added.returncode) == (0, 0, 0), (benched, chatted, added)
    assert {"r.json", "r.html", "r.png"} <= {file.name for file in home.iterdir()}
    assert tomllib.loads((home / "m.toml").read_text())["models"]["x"]["source"] == str(tiny_model_dir.resolve())


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "--prompt", "x", "--temperature", "nan"),
        ("bench", "--top-p", "nan"),
        ("verify-lossless", "--temperature", "inf"),
        ("train", "--data", "x", "--output", "y", "--learning-rate", "nan"),
    ],
)
def test_no_option_takes_what_is_no_number(space, arguments):
    line = refusal(space(*arguments))
    # bounds, where an option has some, refuse it first
    assert "Input should be a finite number" in line or f"Invalid value for '{arguments[-2]}'" in line

"""A conversation taken up again goes on with the model it was had with."""

import json

import pytest

FAST = ("--dtype", "float32", "--max-new-tokens", "4", "--mode", "ar")


@pytest.fixture
def newest(tmp_path, tiny_model_dir):
    """The newest conversation, had with the tiny model."""
    state = tmp_path / "state" / "space"
    state.mkdir(parents=True)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (state / "newest.json").write_text(json.dumps({"format": 1, "model": str(tiny_model_dir), "turns": turns}))
    return state / "newest.json"


def test_its_own_model_answers(space, newest, tmp_path):
    for option in (("--continue",), ("--load", newest)):
        done = space("chat", *option, "--prompt", "r", *FAST, XDG_STATE_HOME=str(tmp_path / "state"))

        assert done.returncode == 0, done
        assert done.stderr == ""


def test_another_model_that_is_asked_for_answers_with_a_word(space, newest, tmp_path, tiny_model_dir):
    done = space(
        "chat", "--continue", "--model", "nano", "--prompt", "r", *FAST, XDG_STATE_HOME=str(tmp_path / "state")
    )
    same = space(
        "chat", "--continue", "--model", newest_model(newest), "--prompt", "r", *FAST,
        XDG_STATE_HOME=str(tmp_path / "state"),
    )  # fmt: skip

    assert done.returncode == 0, done
    assert f"the conversation was with {tiny_model_dir}; nano goes on with it" in done.stderr
    assert same.stderr == ""


def newest_model(file):
    return json.loads(file.read_text())["model"]


def test_a_model_that_is_gone_is_named(space, newest, tmp_path):
    saved = json.loads(newest.read_text())
    newest.write_text(json.dumps(saved | {"model": "/gone/model"}))

    done = space("chat", "--continue", "--prompt", "r", *FAST, XDG_STATE_HOME=str(tmp_path / "state"))

    assert done.returncode == 2
    assert "no model named '/gone/model'" in done.stderr


def test_a_page_without_matplotlib_says_what_is_missing(space, tiny_model_dir, tmp_path, monkeypatch):
    from space_cli.cli import bench
    from space_cli.report import bench_page

    for module in (bench, bench_page):
        monkeypatch.setattr(module, "find_spec", lambda _: None)

    done = space(
        "bench", "--model", tiny_model_dir, "--limit", "1", "--methods", "ar,space", "--dtype", "float32",
        "--max-new-tokens", "8", "--report", "r.html",
    )  # fmt: skip

    assert done.returncode == 0, done
    page = (tmp_path / "r.html").read_text()
    assert "Plots need matplotlib" in page
    assert "<svg" not in page
    assert "left out: pictures of --report: need matplotlib" in done.stderr
